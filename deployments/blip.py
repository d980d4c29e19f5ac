"""BLIP writes its captions in less time, and the same captions.

In: a BLIP that transformers has loaded. Out: the same model with two kinds of its attention exchanged, and a
``generate`` that takes and gives what the model's own does. Beam search, caches and everything else stay the library's.
What is spared, all of it without approximation (float32 differs in the last digits, as between batch sizes):

* Keys and values of the picture's tokens (577 for BLIP-base) are computed once a picture. The library's ``generate``
  repeats a picture's tokens for every beam first, and computes them for each.
* They stay where they are. The library's beam search re-orders its whole cache after every word, although all beams of
  a picture look at the same one: for BLIP-base and 3 beams 128 MB are copied for each word of a caption.
* The beams of a picture ask together, as so many queries: its keys and values are read once for all of them.
* Attention in the image tower is PyTorch's fused one, which never writes the matrix of scores (577 x 577 a head).
* On a CPU a decoder's step for a few rows is spent in linear layers; ``pack`` has them computed by a faster kernel.

Parameters and their names are those of the model; training, log-likelihoods and whatever else calls it go on as before.

Knows no checkpoint, no tokenizer and no Ray.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn import functional
from transformers import BlipForConditionalGeneration
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer, EncoderDecoderCache
from transformers.models.blip.modeling_blip import BlipAttention
from transformers.models.blip.modeling_blip_text import BlipTextSelfAttention


class TowerAttention(BlipAttention):
    """Attention of the image tower by PyTorch's fused kernel; the weights of attention are not returned."""

    def forward(self, hidden_states: torch.Tensor, **kwargs: Any) -> tuple[torch.Tensor, None]:
        """Tokens ``(n, tokens, width)`` -> the same shape."""
        count, length, width = hidden_states.shape
        mixed = self.qkv(hidden_states).view(count, length, 3, self.num_heads, self.head_dim)
        query, key, value = mixed.permute(2, 0, 3, 1, 4).unbind(0)
        dropout = self.dropout.p if self.training else 0.0
        seen = functional.scaled_dot_product_attention(query, key, value, dropout_p=dropout, scale=self.scale)
        return self.projection(seen.transpose(1, 2).reshape(count, length, width)), None


class PictureLayer(DynamicLayer):
    """Keys and values of the pictures' tokens in one layer, ``(n, heads, tokens, head)``: one row a picture, whatever
    the number of beams, and nothing that a beam's change of place would move.
    """

    def __init__(self, keys: torch.Tensor, values: torch.Tensor) -> None:
        super().__init__()
        self.lazy_initialization(keys, values)
        self.keys, self.values = keys, values

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        """Beams change places among those of their picture: nothing to do."""


class PictureAttention(BlipTextSelfAttention):
    """Cross-attention of a decoder's layer; with a ``PictureLayer`` in the cache, the beams of a picture share it."""

    def look(self, pictures: torch.Tensor) -> PictureLayer:
        """What all words will look at: tokens of pictures ``(n, tokens, width)``."""
        shape = (*pictures.shape[:2], self.num_attention_heads, self.attention_head_size)
        keys, values = self.key(pictures).view(shape), self.value(pictures).view(shape)
        return PictureLayer(keys.transpose(1, 2).contiguous(), values.transpose(1, 2).contiguous())

    def forward(
        self, hidden_states: torch.Tensor, *args: Any, past_key_values: Cache | None = None, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Words ``(n x beams, words, width)`` -> the same shape; without a ``PictureLayer``, as the library has it."""
        layer = None
        if isinstance(past_key_values, EncoderDecoderCache):
            layers = past_key_values.cross_attention_cache.layers
            layer = layers[self.layer_idx] if self.layer_idx < len(layers) else None
        if not isinstance(layer, PictureLayer):
            return super().forward(hidden_states, *args, past_key_values=past_key_values, **kwargs)
        rows, words, _ = hidden_states.shape
        pictures, (heads, size) = len(layer.keys), (self.num_attention_heads, self.attention_head_size)
        query = self.query(hidden_states).view(pictures, -1, heads, size).transpose(1, 2)
        seen = functional.scaled_dot_product_attention(query, layer.keys, layer.values)
        return seen.transpose(1, 2).reshape(rows, words, self.all_head_size), None


def quicken(model: BlipForConditionalGeneration) -> None:
    """Exchange the model's attention modules, in place; their parameters are taken over."""
    for layer in model.vision_model.encoder.layers:
        layer.self_attn = _exchanged(layer.self_attn, TowerAttention, layer.self_attn.config)
    for number, layer in enumerate(model.text_decoder.bert.encoder.layer):
        cross = layer.crossattention
        cross.self = _exchanged(cross.self, PictureAttention, cross.self.config, True, number)


#: Rows up to which a packed layer is used; one row alone is read as fast as memory gives it anyway.
_FEW = 16


class FewRows(nn.Linear):
    """A linear layer for as few rows as a step of decoding has: oneDNN on a copy of the weights in its own order.

    Three rows (one picture, three beams) take 0.6 of the time that they take with the weights as they are; from 24 on
    there is no difference. The copy does not follow the weights: for inference alone.
    """

    packed: torch.Tensor | None = None

    def pack(self) -> None:
        """Copy the weights."""
        self.packed = torch.ops.mkldnn._reorder_linear_weight(self.weight.detach(), _FEW)

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """``(..., in)`` -> ``(..., out)``."""
        few = 1 < input.numel() // self.in_features <= _FEW
        if self.packed is None or not few or torch.is_grad_enabled():
            return super().forward(input)
        return torch.ops.mkldnn._linear_pointwise(input, self.packed, self.bias, "none", [], "")


def pack(model: BlipForConditionalGeneration) -> None:
    """Exchange the linear layers of the decoder of a float32 model on a CPU; half a gigabyte more for BLIP-base.

    Keys and values of pictures are left as they are: they have hundreds of rows.
    """
    if not torch.backends.mkldnn.is_available():
        return
    for name, module in list(model.text_decoder.named_modules()):
        if type(module) is nn.Linear and not name.endswith(("crossattention.self.key", "crossattention.self.value")):
            parent, _, own = name.rpartition(".")
            exchanged = _exchanged(module, FewRows, module.in_features, module.out_features)
            exchanged.pack()
            setattr(model.text_decoder.get_submodule(parent), own, exchanged)


def _exchanged(module: nn.Module, kind: type[nn.Module], *arguments: Any) -> Any:
    with torch.device("meta"):  # the parameters are there already
        exchanged = kind(*arguments)
    exchanged.load_state_dict(module.state_dict(keep_vars=True), assign=True)
    return exchanged.train(module.training)


def look(decoder: Any, pictures: torch.Tensor) -> EncoderDecoderCache:
    """The cache with which a quickened decoder's ``generate`` begins: what there is to see in pictures, ``(n, tokens,
    width)``, whatever the number of beams or samples of each.

    ``encoder_hidden_states``, which the library repeats for each, then say only that there is something: one token will
    do.
    """
    layers: list[Any] = [layer.crossattention.self.look(pictures) for layer in decoder.bert.encoder.layer]
    return EncoderDecoderCache(DynamicCache(config=decoder.config), Cache(layers=layers))


def generate(
    model: BlipForConditionalGeneration,
    pixel_values: torch.Tensor,
    input_ids: torch.Tensor | None = None,
    attention_mask: torch.Tensor | None = None,
    **settings: Any,
) -> torch.Tensor:
    """Token ids of captions by a quickened model; arguments and answer are those of its own ``generate``."""
    pictures = model.vision_model(pixel_values=pixel_values).last_hidden_state
    config, decoder = model.config.text_config, model.text_decoder
    begin = torch.full((len(pictures), 1), config.bos_token_id, device=pictures.device)
    if input_ids is not None:
        # the tokenizer has put its own first token in the place of the decoder's, and an end after the prompt
        begin = torch.cat([begin, input_ids[:, 1:-1]], 1)
    return decoder.generate(
        input_ids=begin,
        attention_mask=None if attention_mask is None else attention_mask[:, :-1],
        encoder_hidden_states=pictures[:, :1],
        past_key_values=look(decoder, pictures),
        eos_token_id=config.sep_token_id,
        pad_token_id=config.pad_token_id,
        **settings,
    )
