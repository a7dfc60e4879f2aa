"""What varies between the versions of picollm's and nanochat's model, as a transformers config."""

from __future__ import annotations

from typing import Any, ClassVar

from huggingface_hub.dataclasses import strict
from transformers.configuration_utils import PreTrainedConfig

MODEL_TYPE = "sftflow_nanochat"
EPS = 2.0**-23
"""of the norms: the spacing of fp32 numbers at 1, which torch's `rms_norm` takes where none is given"""


@strict
class SftflowNanochatConfig(PreTrainedConfig):
    """The defaults are today's layout, of the size of its 12 layers.

    max_position_embeddings: theirs is `sequence_len`.   window_pattern: S and L, repeated over the layers; the last
    layer is always long.   sliding_window, long_window: how many keys a query of a short and of a long layer sees,
    itself counted; None: all of them.   layer_types: made of the pattern.
    qk_scale: by what queries and keys are multiplied after their norm.
    value_layers: those with a value embedding, whose gate lies between 0 and `value_gate_range` and reads the first
    `value_gate_channels` of the layer's input.   smear_channels: what of a token's embedding opens it to the one before
    it; 0: no smear.   backout_layer: the layer whose output is taken off again before the head; None: none.
    """

    model_type = MODEL_TYPE
    when_made: ClassVar[Any] = staticmethod(lambda: None)
    """see `registration`: it imports the model, which imports this"""
    keys_to_ignore_at_inference = ["past_key_values"]  # noqa: RUF012  (transformers' way of saying it)

    vocab_size: int = 32768
    hidden_size: int = 768
    intermediate_size: int = 3072
    num_hidden_layers: int = 12
    num_attention_heads: int = 6
    num_key_value_heads: int = 6
    max_position_embeddings: int = 2048
    window_pattern: str = "SSSL"
    sliding_window: int | None = 513
    long_window: int | None = 2049
    layer_types: Any = None
    rope_parameters: Any = None
    qk_scale: float = 1.2
    value_layers: Any = None
    value_gate_channels: int = 12
    value_gate_range: float = 3.0
    smear_channels: int = 24
    backout_layer: int | None = 6
    final_logit_softcapping: float | None = 15.0
    rms_norm_eps: float = EPS
    initializer_range: float = 0.02
    use_cache: bool = True
    pad_token_id: int | None = None
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    tie_word_embeddings: bool = False

    def __post_init__(self, **kwargs: Any) -> None:
        n = self.num_hidden_layers
        if self.layer_types is None:
            letters = [self.window_pattern[i % len(self.window_pattern)] for i in range(n - 1)]
            self.layer_types = [
                *("sliding_attention" if c == "S" else "full_attention" for c in letters),
                "full_attention",
            ]
        if self.value_layers is None:
            self.value_layers = [i for i in range(n) if i % 2 == (n - 1) % 2]
        if self.rope_parameters is None:
            self.rope_parameters = {"rope_type": "default", "rope_theta": 100000.0}
        super().__post_init__(**kwargs)
        import transformers.models.auto.configuration_auto  # noqa: F401  (registers this class, and sets `when_made`)

        self.when_made()
