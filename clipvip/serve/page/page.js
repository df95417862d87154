// The search page. The address holds the search, so that Back, Reload and bookmarks work.
// Names of files come from strangers: they are only ever set as text.

const STEP = 48, MOST = 200;
const UPLOAD_MB = 64; // a server that gets more hangs up, which tells a page nothing
const byId = (id) => document.getElementById(id);
const [q, hitList, player, video, still] = ["q", "hits", "player", "video", "still"].map(byId);

let hits = [];
let upload = null; // a File to search with
let shown = STEP; // hits that are asked for
let current = -1; // place of the hit in the player
let asked = 0; // number of the latest search: answers to earlier ones are dropped

// --- the address -----------------------------------------------------------------------------

// Values stay encoded: a folder's name may hold bytes that are no text.
const address = () => new Map(location.search.slice(1).split("&").filter(Boolean).map((pair) => {
  const at = pair.indexOf("=");
  return at < 0 ? [pair, ""] : [pair.slice(0, at), pair.slice(at + 1)];
}));

function decoded(text) {
  try {
    return decodeURIComponent((text ?? "").replaceAll("+", " "));
  } catch {
    return "";
  }
}

const joined = (pairs) => [...pairs].filter(([, value]) => value !== "").map((pair) => pair.join("=")).join("&");

function filters() {
  const length = new Map(byId("length").value.split("&").filter(Boolean).map((pair) => pair.split("=")));
  return new Map([
    ["folder", byId("folder").value],
    ...length,
    ["after", byId("after").value],
    ["before", byId("before").value],
  ].filter(([, value]) => value));
}

function go(pairs) {
  const query = joined([...pairs, ...filters()]);
  history.pushState(null, "", query ? `/?${query}` : "/");
  shown = STEP;
  search();
}

function readAddress() {
  const values = address();
  q.value = decoded(values.get("q"));
  byId("after").value = decoded(values.get("after"));
  byId("before").value = decoded(values.get("before"));
  byId("length").value = joined(["min_duration", "max_duration"].map((name) => [name, values.get(name) ?? ""]));
  if (byId("length").selectedIndex < 0) byId("length").value = "";
  const folder = values.get("folder") ?? "";
  if (folder && ![...byId("folder").options].some((option) => option.value === folder)) {
    byId("folder").add(new Option(decoded(folder) || folder, folder));
  }
  byId("folder").value = folder;
  showActive();
}

function showActive() {
  const count = filters().size;
  byId("active").textContent = count || "";
  if (count) showFilters(true);
}

function showFilters(open) {
  byId("filters").hidden = !open;
  byId("show-filters").setAttribute("aria-expanded", open);
}

// --- searches --------------------------------------------------------------------------------

async function fetchJson(url, options) {
  let response;
  try {
    response = await fetch(url, options);
  } catch {
    throw new Error("The server does not answer. Is it still running?");
  }
  const value = await response.json().catch(() => ({}));
  if (!response.ok) throw new Error(value.error ?? `The server answered ${response.status}.`);
  return value;
}

async function search() {
  const values = address(), number = ++asked;
  const limits = [...filters(), ["k", shown]];
  const like = values.get("like"), text = values.get("q");
  let url, options;
  if (upload) {
    url = "/api/search";
    options = { method: "POST", body: upload, headers: { "Content-Type": upload.type || "application/octet-stream" } };
  } else if (like) {
    url = `/api/like/${like.replaceAll(/[^0-9a-f]/g, "-")}`; // leads nowhere else
  } else if (text) {
    url = "/api/search";
    limits.unshift(["q", text]);
  }
  document.body.classList.toggle("start", !url);
  showError("");
  if (!url) {
    document.title = "Search your videos";
    say("");
    draw([]);
    return;
  }
  document.title = upload || like ? "Similar moments" : `${decoded(text)} · videos`;
  hitList.setAttribute("aria-busy", "true");
  say("Searching …");
  try {
    if (upload?.size > UPLOAD_MB << 20) throw new Error(`The file is larger than ${UPLOAD_MB} MB.`);
    const answer = await fetchJson(`${url}?${joined(limits)}`, options);
    if (number !== asked) return;
    draw(answer.hits);
    const count = hits.length === 1 ? "1 moment" : `${hits.length} moments`;
    const of = like && !upload ? " like the one that you chose" : "";
    say(hits.length ? `${count}${of}, in ${answer.seconds.toFixed(2)} s` : "Nothing found. Try fewer filters.");
  } catch (error) {
    if (number !== asked) return;
    draw([]);
    say("");
    showError(error.message);
  }
  hitList.removeAttribute("aria-busy");
}

function say(text) {
  byId("status").textContent = text;
}

function showError(text) {
  byId("error").textContent = text;
  byId("error").hidden = !text;
}

const like = (hit) => {
  setUpload(null);
  q.value = "";
  player.close();
  scrollTo(0, 0);
  go([["like", hit.id]]);
};

// --- results ---------------------------------------------------------------------------------

function clock(seconds) {
  const whole = Math.floor(seconds);
  return [whole / 3600, (whole / 60) % 60, whole % 60].map((part) => String(Math.floor(part)).padStart(2, "0")).join(":");
}

function span(start, end, duration) {
  return start === null && end === null ? clock(duration) : `${clock(start ?? 0)}–${clock(end ?? duration)}`;
}

function element(name, className, text) {
  const made = document.createElement(name);
  made.className = className;
  if (text !== undefined) made.textContent = text;
  return made;
}

function card(hit, place) {
  const item = element("li", "hit"), open = element("button", "open");
  const time = hit.image ? "" : span(hit.start, hit.end, hit.duration);
  open.type = "button";
  open.tabIndex = place === 0 ? 0 : -1;
  open.setAttribute("aria-label", `Play ${hit.name}${time && `, ${time}`}`);
  const picture = element("img", "");
  picture.alt = "";
  picture.loading = "lazy";
  picture.decoding = "async";
  picture.addEventListener("error", () => open.classList.add("none"));
  picture.src = `/api/thumbnail/${hit.id}.jpg?width=640`;
  open.append(picture);
  if (time) open.append(element("span", "time", time));
  open.addEventListener("click", () => play(place));
  open.addEventListener("focus", () => {
    for (const other of hitList.querySelectorAll(".open")) other.tabIndex = other === open ? 0 : -1;
  });
  const more = element("button", "like");
  more.type = "button";
  more.title = "More like this (m)";
  more.setAttribute("aria-label", `More like ${hit.name}${time && `, ${time}`}`);
  more.append(byId("like-icon").content.cloneNode(true));
  more.tabIndex = -1; // the keyboard has m
  more.addEventListener("click", () => like(hit));
  const about = element("div", "about"), name = element("bdi", "name", hit.name);
  name.title = `${hit.folder}/${hit.name}`;
  about.append(name, element("span", "score", hit.score.toFixed(3)));
  item.append(open, more, about);
  if (hit.caption !== null) {
    const caption = element("p", "caption", hit.caption);
    caption.dir = "auto";
    caption.title = hit.caption; // as three lines of it are shown; the player has all
    item.append(caption);
  }
  return item;
}

function draw(found) {
  const held = hits.length && found.length > hits.length && hits.every((hit, place) => hit.id === found[place].id);
  const first = held ? hits.length : 0; // "Show more" leaves the cards that are there
  hits = found;
  if (!first) hitList.replaceChildren();
  hitList.append(...hits.slice(first).map((hit, place) => card(hit, first + place)));
  byId("more").hidden = hits.length < shown || shown >= MOST;
}

function cards() {
  return [...hitList.querySelectorAll(".open")];
}

function move(key) {
  const all = cards(), at = all.indexOf(document.activeElement);
  if (at < 0) return false;
  const top = all[0].getBoundingClientRect().top;
  const columns = all.filter((one) => Math.abs(one.getBoundingClientRect().top - top) < 1).length;
  const to = at + { ArrowLeft: -1, ArrowRight: 1, ArrowUp: -columns, ArrowDown: columns }[key];
  if (to < 0 && key === "ArrowUp") q.focus();
  all[to]?.focus();
  return true;
}

// --- the player ------------------------------------------------------------------------------

function play(place) {
  const hit = hits[place];
  current = place;
  byId("title").firstElementChild.textContent = hit.name;
  const matches = hit.from !== null && (hit.from !== hit.start || hit.to !== hit.end);
  const around = matches ? ` · matches from ${clock(hit.from)} to ${clock(hit.to ?? hit.duration)}` : "";
  byId("where").firstElementChild.textContent = hit.folder + around;
  byId("caption").textContent = hit.caption ?? "";
  byId("caption").scrollTop = 0;
  byId("caption").hidden = hit.caption === null;
  byId("again").textContent = hit.image ? "" : `↺ ${span(hit.start, hit.end, hit.duration)}`;
  byId("again").hidden = hit.image;
  byId("previous").disabled = place === 0;
  byId("next").disabled = place === hits.length - 1;
  note("");
  stop();
  video.hidden = hit.image;
  still.hidden = !hit.image;
  if (!player.open) player.showModal();
  if (hit.image) {
    // What the browser cannot show, such as TIFF, is shown as JPEG.
    still.onerror = () => {
      still.onerror = null;
      still.src = `/api/thumbnail/${hit.id}.jpg?width=1280`;
    };
    still.src = `/api/video/${hit.id}`;
    still.alt = hit.name;
    return;
  }
  video.poster = `/api/thumbnail/${hit.id}.jpg?width=640`;
  load(`/api/video/${hit.id}`, hit.start ?? 0, () => convert(hit));
}

function load(url, start, failed) {
  video.onerror = failed;
  video.onloadedmetadata = () => {
    if (!video.videoWidth) return failed(); // only the sound can be played
    video.currentTime = start;
    video.dataset.start = start;
    video.play().catch(() => {}); // the reader may start it
  };
  video.src = url;
}

function convert(hit) {
  const url = `/api/clip/${hit.id}.mp4`;
  note("Converting this moment, as your browser cannot play the file …");
  load(url, Math.max((hit.start ?? 0) - hit.film[0], 0), async () => {
    video.onerror = null;
    const answer = await fetchJson(url).catch((error) => error);
    if (hits[current] !== hit || !player.open) return; // another one is shown now
    note(answer.message ?? "This moment cannot be played.");
  });
  video.addEventListener("playing", () => note(""), { once: true });
}

function note(text) {
  byId("note").textContent = text;
  byId("note").hidden = !text;
}

function stop() {
  video.onerror = video.onloadedmetadata = null;
  video.removeAttribute("src");
  video.removeAttribute("poster");
  video.load();
  still.onerror = null;
  still.removeAttribute("src");
}

player.addEventListener("close", () => {
  if (player.open) return; // the event comes late, and another hit was opened meanwhile
  stop();
  cards()[current]?.focus();
});
for (const dialog of document.querySelectorAll("dialog")) {
  dialog.addEventListener("click", (event) => event.target === dialog && dialog.close());
}
byId("close").addEventListener("click", () => player.close());
byId("again").addEventListener("click", () => {
  video.currentTime = Number(video.dataset.start);
  video.play().catch(() => {});
});
byId("previous").addEventListener("click", () => play(current - 1));
byId("next").addEventListener("click", () => play(current + 1));
byId("like").addEventListener("click", () => like(hits[current]));

// --- images and videos as queries -------------------------------------------------------------

const chip = byId("upload");

function setUpload(file) {
  const [picture, name] = [chip.querySelector("img"), chip.querySelector("bdi")];
  if (picture.src) URL.revokeObjectURL(picture.src);
  picture.removeAttribute("src");
  upload = file;
  chip.hidden = !file;
  picture.hidden = !file?.type.startsWith("image/");
  name.textContent = file?.name ?? "";
  if (file && !picture.hidden) picture.src = URL.createObjectURL(file);
  byId("file").value = "";
}

function searchWith(file) {
  if (!file) return;
  setUpload(file);
  q.value = "";
  go([]);
}

chip.querySelector("button").addEventListener("click", () => {
  setUpload(null);
  search();
  q.focus();
});
byId("file").addEventListener("change", (event) => searchWith(event.target.files[0]));
addEventListener("paste", (event) => searchWith(event.clipboardData?.files[0]));
const holdsFiles = (event) => event.dataTransfer?.types.includes("Files");
addEventListener("dragover", (event) => {
  if (!holdsFiles(event)) return;
  event.preventDefault();
  byId("drop").hidden = false;
});
addEventListener("dragleave", (event) => {
  if (!event.relatedTarget) byId("drop").hidden = true;
});
addEventListener("drop", (event) => {
  if (!holdsFiles(event)) return;
  event.preventDefault();
  byId("drop").hidden = true;
  searchWith(event.dataTransfer.files[0]);
});

// --- what is in the index, and adding to it ---------------------------------------------------

async function describe() {
  try {
    const about = await fetchJson("/api/index");
    const hours = about.seconds / 3600;
    const long = hours >= 1 ? `${Math.round(hours).toLocaleString()} h` : `${Math.round(about.seconds / 60)} min`;
    const described = about.captions ? `; ${about.captions.toLocaleString()} have a caption` : "";
    byId("about").textContent = `${about.moments.toLocaleString()} moments in ${about.videos.toLocaleString()} files, ${long}${described}`;
    byId("show-add").hidden = !about.can_add;
    const chosen = byId("folder").value;
    const options = about.folders.map((folder) => new Option(folder.text, folder.query));
    byId("folder").replaceChildren(new Option("All folders", ""), ...options);
    if (chosen && !options.some((option) => option.value === chosen)) {
      byId("folder").add(new Option(decoded(chosen) || chosen, chosen));
    }
    byId("folder").value = chosen;
    if (about.can_add) watch(false);
  } catch (error) {
    showError(error.message);
  }
}

let watching = false;

async function watch(started) {
  if (watching) return;
  watching = true;
  let running = started;
  for (;;) {
    let state;
    try {
      state = await fetchJson("/api/add");
    } catch (error) {
      state = { state: "failed", message: error.message };
    }
    if (state.state === "running") running = true;
    if (running) showAdding(state);
    if (state.state !== "running") break;
    await new Promise((wake) => setTimeout(wake, 1000));
  }
  watching = false;
  if (running) describe();
}

function showAdding(state) {
  const busy = state.state === "running", failed = state.state === "failed";
  const bar = byId("progress").querySelector("progress");
  byId("progress").hidden = failed;
  if (busy && !state.share) bar.removeAttribute("value");
  else bar.value = state.share ?? 0;
  const files = state.total ? `${state.done} of ${state.total} files, ` : "";
  byId("progress").querySelector("p").textContent = busy ? `${state.path}: ${files}${state.message}` : `Done. ${state.message}.`;
  byId("add-error").textContent = failed ? state.message : "";
  byId("add-error").hidden = !failed;
  byId("start-add").disabled = busy;
  byId("show-add").textContent = busy ? `Adding … ${Math.round(100 * (state.share ?? 0))} %` : "Add a folder";
}

byId("show-add").addEventListener("click", () => {
  byId("add").showModal();
  byId("path").focus();
});
byId("close-add").addEventListener("click", () => byId("add").close());
byId("add-form").addEventListener("submit", async (event) => {
  event.preventDefault();
  try {
    const body = JSON.stringify({ path: byId("path").value });
    showAdding(await fetchJson("/api/add", { method: "POST", body, headers: { "Content-Type": "application/json" } }));
    watch(true);
  } catch (error) {
    byId("add-error").textContent = error.message;
    byId("add-error").hidden = false;
  }
});

// --- events ----------------------------------------------------------------------------------

byId("search").addEventListener("submit", (event) => {
  event.preventDefault();
  setUpload(null);
  const text = q.value.trim();
  go(text ? [["q", encodeURIComponent(text.toWellFormed?.() ?? text)]] : []);
});
byId("show-filters").addEventListener("click", () => showFilters(byId("filters").hidden));
byId("filters").addEventListener("change", () => {
  showActive();
  const values = address();
  go(["q", "like"].filter((name) => values.has(name)).map((name) => [name, values.get(name)]));
});
byId("clear").addEventListener("click", () => {
  for (const id of ["folder", "length", "after", "before"]) byId(id).value = "";
  byId("filters").dispatchEvent(new Event("change"));
});
byId("more").addEventListener("click", () => {
  shown = Math.min(shown + STEP, MOST);
  search();
});

addEventListener("keydown", (event) => {
  if (event.ctrlKey || event.metaKey || event.altKey || byId("add").open) return;
  const typing = event.target.matches("input, select, textarea") && event.target !== byId("file");
  let used = true;
  if (player.open) {
    if (event.key === "m") like(hits[current]);
    else if (event.key === "ArrowLeft" && event.target !== video) current > 0 && play(current - 1);
    else if (event.key === "ArrowRight" && event.target !== video) current < hits.length - 1 && play(current + 1);
    else used = false;
  } else if (event.key === "/" && !typing) {
    q.focus();
    q.select();
  } else if (event.key === "ArrowDown" && event.target === q) {
    cards()[0]?.focus();
  } else if (event.key === "Escape" && event.target === q) {
    q.blur();
  } else if (event.key === "m" && !typing) {
    const at = cards().indexOf(document.activeElement);
    if (at >= 0) like(hits[at]);
  } else if (event.key.startsWith("Arrow") && !typing) {
    used = move(event.key);
  } else {
    used = false;
  }
  if (used) event.preventDefault();
});
addEventListener("popstate", () => {
  setUpload(null);
  readAddress();
  shown = STEP;
  search();
});

readAddress();
if (!address().size) q.focus();
describe();
search();
