"""CLIP-ViP as a transformers model; importing this package registers it with the Auto classes."""

from transformers import AutoConfig, AutoModel, AutoModelForImageTextToText, AutoProcessor

from clipvip.model.captioning import CLIPViPForCaptioning
from clipvip.model.configuration import CLIPViPConfig, CLIPViPVisionConfig
from clipvip.model.modeling import CLIPViPModel, CLIPViPOutput
from clipvip.model.processing import CLIPViPProcessor

AutoConfig.register("clipvip", CLIPViPConfig)
AutoModel.register(CLIPViPConfig, CLIPViPModel)
AutoModelForImageTextToText.register(CLIPViPConfig, CLIPViPForCaptioning)
AutoProcessor.register(CLIPViPConfig, CLIPViPProcessor)

__all__ = [
    "CLIPViPConfig",
    "CLIPViPForCaptioning",
    "CLIPViPModel",
    "CLIPViPOutput",
    "CLIPViPProcessor",
    "CLIPViPVisionConfig",
]
