"""CLIP-ViP as a transformers model; importing this registers it with the Auto classes."""

from transformers import AutoConfig, AutoModel

from clipvip.model.configuration import CLIPViPConfig, CLIPViPVisionConfig
from clipvip.model.modeling import CLIPViPModel, CLIPViPOutput

AutoConfig.register("clipvip", CLIPViPConfig)
AutoModel.register(CLIPViPConfig, CLIPViPModel)

__all__ = ["CLIPViPConfig", "CLIPViPModel", "CLIPViPOutput", "CLIPViPVisionConfig"]
