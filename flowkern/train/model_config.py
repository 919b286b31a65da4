"""What of a configuration is the model: a pipeline, its sizes, its text, and how it computes."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from flowkern.checks import ABOVE_0, AT_LEAST_0, count
from flowkern.train.fields import Origin, Phrase, Place, Section, Text

Pixels = Annotated[int | None, count(2**16)]


class ModelConfig(Section):
    index: ClassVar[str] = "model_index.json"
    """The file by which the hub is asked whether it has such a model."""
    path: Origin
    """A diffusers pipeline: a directory, or the id of one on the Hugging Face hub, OWNER/NAME."""
    revision: Text | None = None
    """Of an id: a branch, a tag or a commit; None: its main branch, or on a resume what the run
    began with. A run's own configuration has the commit."""
    height: Pixels = None
    """Image height in pixels; None: the pipeline's own."""
    width: Pixels = None
    """Image width in pixels; None: the pipeline's own."""
    num_frames: Pixels = None
    """Frames of a video; None: the pipeline's own."""
    guidance_scale_2: Annotated[float | None, AT_LEAST_0] = None
    """Of a pipeline's second network, where guidance_scale is beyond 1; None: as of the first."""
    guidance_embedding: Annotated[float | None, AT_LEAST_0] = None
    """What a network that takes a guidance scale is told; None: as the pipeline has it."""
    negative_prompt: Phrase | None = None
    """What stands for no prompt where guidance_scale is beyond 1; None: the family's own."""
    frame_rate: Annotated[float | None, ABOVE_0] = None
    """Frames per second, of a family that is told it; None: the pipeline's own."""
    max_sequence_length: Annotated[int | None, AT_LEAST_0] = None
    """Tokens of a prompt; None: as the pipeline has it, or as few as hold all of a run's where a
    network does not look at padding."""
    prompt_cache: Place | None = None
    """A folder of encoded prompts, which runs share and find again: text encoders are loaded where
    it lacks one. None: in the host's memory, .5 to 16 MB each (docs/models.md)."""
    vae_slicing: bool = False
    """Decode one image or video at a time, in the least memory; else as many as four images of
    1024 x 1024 have pixels."""
    vae_dtype: Literal["fp32", "bf16"] = "fp32"
    """Of the VAE. bf16 halves its memory, and moves the images that rewards see: docs/models.md."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, about a third more time."""
    attention_backend: Text | None = None
    """Of the network, as diffusers names it: native, flash, _flash_3, flash_hub, xformers, ...
    (docs/models.md); sage is for `flowkern sample` only. None: the family's own, by torch."""
    compile: bool = False
    """Compile the network's repeated blocks, once, for calls of train.max_batch rows: fewer are
    filled up. Takes a C++ compiler, or Triton on CUDA."""
    quantization: Literal["float8", "int8", "nf4"] | None = None
    """Of the frozen network under lora. int8 and nf4 keep its weights in 8 and 4 bits, for memory;
    nf4 takes bitsandbytes. float8: products in float8, with a scale for every row of what comes in
    and of the weights, for time; takes CUDA of compute capability 8.9, and bf16."""
