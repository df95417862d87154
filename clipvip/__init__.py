"""CLIP-ViP: video-text models from image-text CLIP, with kernels of their own.

Importing this package loads torch and the compiled kernels; the model, the data
path and the trainer are imported from their own modules when they are used.
"""

from clipvip import ops

__version__ = "0.1.0"
__all__ = ["ops"]
