"""Loading and saving of models and tokenizers, and what makes a model usable here."""

from __future__ import annotations

import dataclasses
import hashlib
import re
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
import yaml
from huggingface_hub import ModelCard, hf_hub_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BitsAndBytesConfig,
    GgufConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from sku.config.data import EMBEDDED, ModelConfig
from sku.errors import ModelError, RecipeError, first_line, one_line
from sku.hazard import is_marked_model, mark_model
from sku.model_files import (
    check_not_quantized,
    check_stored_types,
    locate_model,
    naming_the_model,
    with_gguf_file,
)

_CONTENT_SUFFIXES = (".safetensors", ".bin", ".json", ".jinja", ".model", ".txt", ".gguf")
"""Files that decide what a model computes; a README does not."""
_FACTORS_ALONE = (True, False, None, "gaussian", "orthogonal", "eva", "mica")
"""Values of ``init_lora_weights`` that only draw a LoRA's factors; others take a part out of the original weights."""


UNBUILT = (
    OSError, ValueError, KeyError, TypeError, AttributeError, RuntimeError, ImportError, ArithmeticError, re.error,
)  # fmt: skip
"""What transformers and PEFT raise for settings that make no model."""


@dataclass(frozen=True, kw_only=True)
class LoadedModel:
    """A model with its tokenizer and where they came from."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    name: str
    revision: str | None
    """Commit of a hub model."""


def load_model(source: str | Path | ModelConfig, *, four_bit: bool = False) -> LoadedModel:
    """Loads a causal language model with its tokenizer.

    Args:
        source: Local folder, hub id, ``embedded``, or a full configuration.
        four_bit: Quantize the linear layers to NF4 while loading (QLoRA); needs bitsandbytes.

    Returns:
        The model in evaluation mode, marked where its configuration is, and a tokenizer that has a pad token.

    Raises:
        ModelError: It can't be found or read, is quantized in a way that can't be trained, or has no usable pad
            token.
    """
    config = with_gguf_file(source if isinstance(source, ModelConfig) else ModelConfig(path=str(source)))
    more: dict[str, Any] = {}
    if four_bit and config.gguf_file is None:
        check_four_bit()
        device = pick_device(config.device)
        quantized = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=pick_dtype("auto", device),
        )
        more = {"quantization_config": quantized, "device_map": {"": device}}
    loaded = _load(AutoModelForCausalLM, config, **more)
    ensure_pad_token(loaded.tokenizer, loaded.model)
    if is_marked_model(loaded.model):
        mark_model(loaded.model)
    return loaded


def load_classifier(config: ModelConfig) -> LoadedModel:
    """Loads a sequence classifier with its tokenizer.

    Args:
        config: Where it is; a GGUF file holds no classifier.

    Returns:
        The model in evaluation mode, and its tokenizer, which may lack a pad token.

    Raises:
        ModelError: It can't be found or read, or its files hold no classification head.
    """
    return _load(AutoModelForSequenceClassification, config)


def new_classifier(config: ModelConfig, labels: Sequence[str]) -> LoadedModel:
    """A sequence classifier to be trained: the body of a model, and a head with weights drawn by torch's seed.

    Args:
        config: Where the body is: an encoder, or a causal language model, as a folder, hub id or GGUF file.
        labels: Names of the classes.

    Returns:
        The model in evaluation mode, and a tokenizer that has a pad token.

    Raises:
        ModelError: It can't be found or read, or has no usable pad token.
    """
    names = dict(enumerate(labels))
    loaded = _load(
        AutoModelForSequenceClassification, config, new_head=True,
        num_labels=len(names), id2label=names, label2id={label: number for number, label in names.items()},
    )  # fmt: skip
    ensure_pad_token(loaded.tokenizer, loaded.model)
    loaded.model.config.get_text_config().pad_token_id = loaded.tokenizer.pad_token_id
    return loaded


def _load(loader: Any, config: ModelConfig, *, new_head: bool = False, **more: Any) -> LoadedModel:
    """The model in evaluation mode and its tokenizer.

    Args:
        loader: ``AutoModelFor...``.
        config: Where they are, and in what type and on what device they are wanted.
        new_head: Whether weights are to be drawn, so that some may be missing in the files.
        more: For ``from_pretrained``.
    """
    name, options = locate_model(config)
    device, is_gguf = pick_device(config.device), "gguf_file" in options
    if is_gguf:
        # Else the weights stay packed where the ``kernels`` package is installed.
        more["quantization_config"] = GgufConfig(dequantize=True)
    with naming_the_model(config.path):
        tokenizer = AutoTokenizer.from_pretrained(name, **options)
        if loader is AutoModelForCausalLM and not is_gguf:
            check_not_quantized(AutoConfig.from_pretrained(name, **options), name)
            check_stored_types(Path(name))
        model, loading = loader.from_pretrained(
            name,
            **options,
            **more,
            use_safetensors=None if is_gguf else True,
            output_loading_info=True,
            dtype="auto" if config.dtype == "stored" else pick_dtype(config.dtype, device),
        )
    if not new_head:
        _check_complete(loading, config.path)
    if is_gguf:
        forget_quantizer(model)
    if "device_map" not in more:
        torch.nn.Module.to(model, device)
    model.eval()
    return LoadedModel(
        model=model, tokenizer=tokenizer, name=config.path, revision=getattr(model.config, "_commit_hash", None)
    )


def load_config(config: ModelConfig) -> PreTrainedConfig:
    """What a model's ``config.json`` says, without its weights.

    Raises:
        ModelError: It can't be found or read.
    """
    name, options = locate_model(config)
    with naming_the_model(config.path):
        found = AutoConfig.from_pretrained(name, **options)
    assert isinstance(found, PreTrainedConfig)
    return found


def without_weights(config: PreTrainedConfig, dtype: torch.dtype, name: str) -> PreTrainedModel:
    """The model of a configuration on torch's ``meta`` device: shapes and types, no content, and so no memory.

    Args:
        config: Of the model.
        dtype: Of its weights.
        name: For messages.

    Raises:
        ModelError: transformers has no such architecture, or the settings make no model.
    """
    try:
        with warnings.catch_warnings(), torch.device("meta"):
            warnings.simplefilter("ignore")  # Of single architectures' internals, and of empty weights: refused below.
            model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    except UNBUILT as error:
        raise ModelError(f"model {name} can't be built from its configuration: {first_line(error)}") from error
    empty = next((own for own, weight in model.named_parameters() if not weight.numel()), None)
    if empty is not None:
        raise ModelError(f"model {name} can't be built from its configuration: its weight {empty} is empty")
    assert isinstance(model, PreTrainedModel)
    return model


def with_adapter(model: PreTrainedModel, adapter: PeftConfig) -> PeftModel:
    """A model without weights with an adapter added to it; PEFT holds adapters in float32 whatever the model's type.

    Raises:
        RecipeError: The adapter doesn't fit.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Of transposed layers, which PEFT sets right.
            adapted = get_peft_model(model, adapter, low_cpu_mem_usage=True)
    except UNBUILT as error:
        raise RecipeError(f"the adapter can't be added: {one_line(error)}") from error
    assert isinstance(adapted, PeftModel)
    for parameter in adapted.parameters():
        if parameter.requires_grad:  # PEFT leaves adapters that have no content yet in the model's type.
            parameter.data = parameter.data.float()
    return adapted


def weights_revision(config: ModelConfig) -> str | None:
    """What tells two states of a model apart.

    Returns:
        ``sha256:`` and a hash over weights, configuration and tokenizer of a local folder; the commit of a hub model,
        None where the hub names none.

    Raises:
        ModelError: It can't be found or read.
    """
    name, _ = locate_model(config)
    if not Path(name).is_dir():
        commit = getattr(load_config(config), "_commit_hash", None)
        return None if commit is None else str(commit)
    digest = hashlib.sha256()
    for path in sorted(Path(name).iterdir()):
        if path.suffix in _CONTENT_SUFFIXES:
            with path.open("rb") as file:
                digest.update(f"{path.name}\0{hashlib.file_digest(file, 'sha256').hexdigest()}\0".encode())
    return f"sha256:{digest.hexdigest()}"


def own_license(config: ModelConfig) -> str | None:
    """The licence that a model's own card states; None where it has no card, states none, or is out of reach."""
    if config.path == EMBEDDED:
        return "apache-2.0"
    name, _ = locate_model(config)
    try:
        path = Path(name) / "README.md"
        if not Path(name).is_dir():
            path = Path(hf_hub_download(name, "README.md", revision=config.revision))
        data = ModelCard.load(path, ignore_metadata_errors=True).data.to_dict()
    except (OSError, ValueError, HfHubHTTPError, HFValidationError, yaml.YAMLError):
        return None
    stated = data.get("license_name") if data.get("license") == "other" else data.get("license")
    return stated if isinstance(stated, str) else None


def load_tokenizer(config: ModelConfig) -> PreTrainedTokenizerBase:
    """The tokenizer alone, as ``load_model`` would give it.

    Raises:
        ModelError: It can't be found or has no usable pad token.
    """
    name, options = locate_model(config)
    with naming_the_model(config.path):
        tokenizer = AutoTokenizer.from_pretrained(name, **options)
    ensure_pad_token(tokenizer)
    assert isinstance(tokenizer, PreTrainedTokenizerBase)
    return tokenizer


def pick_device(name: str) -> torch.device:
    """The device a name stands for; ``auto`` prefers CUDA, then MPS, then the CPU.

    Raises:
        ModelError: The name is unknown or the machine has no such device.
    """
    if name == "auto":
        return torch.device(
            "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
        )
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ModelError(f"model.device is {name!r}; it must be auto, cpu, cuda, cuda:N or mps") from None
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ModelError(f"model.device is {name}, but torch {torch.__version__} sees no CUDA device here")
    return device


def pick_dtype(name: str, device: torch.device) -> torch.dtype:
    """The floating type a name stands for; ``auto`` is bfloat16 on a GPU that has it and float32 elsewhere."""
    if name == "auto":
        return torch.bfloat16 if device.type == "cuda" and torch.cuda.is_bf16_supported() else torch.float32
    dtype = getattr(torch, name)
    assert isinstance(dtype, torch.dtype)
    return dtype


def ensure_pad_token(tokenizer: PreTrainedTokenizerBase, model: PreTrainedModel | None = None) -> None:
    """Gives a tokenizer without a pad token one that the model's vocabulary already holds.

    No token is added: a new row of the embedding would be a weight that the base model doesn't have. Padding is
    always told by mask and labels, so the pad token may stand for something else as well.

    Raises:
        ModelError: There is neither a pad, an unknown, nor an end token, or its id lies beyond the embedding.
    """
    if tokenizer.pad_token_id is None:
        substitute = tokenizer.eos_token or tokenizer.unk_token
        if substitute is None:
            raise ModelError(
                "the tokenizer has no pad token and no end or unknown token to stand in for it; set "
                "tokenizer.pad_token to a token of its vocabulary and save it"
            )
        tokenizer.pad_token = substitute
    if model is not None:
        rows = embedding_weight(model).shape[0]
        if not 0 <= int(tokenizer.pad_token_id) < rows:
            raise ModelError(
                f"pad token id {tokenizer.pad_token_id} lies outside the model's {rows} embeddings; "
                "set tokenizer.pad_token to a token that the model knows"
            )


def forget_quantizer(model: PreTrainedModel) -> None:
    """Removes the marks that a GGUF loader leaves on a model whose weights are already plain floats.

    With them transformers refuses to save the model.

    Raises:
        ModelError: Some weights are still quantized.
    """
    check_plain_weights(model, "the model loaded from GGUF")
    for holder, attribute in (
        (model.config, "quantization_config"), (model, "hf_quantizer"), (model, "quantization_method"),
        (model, "is_quantized"),
    ):  # fmt: skip
        if attribute in vars(holder):
            delattr(holder, attribute)


def check_plain_weights(model: torch.nn.Module, name: str) -> None:
    """Refuses weights that are no floating-point numbers: their difference would not be a task vector.

    Raises:
        ModelError: With the first such parameter.
    """
    for parameter_name, parameter in model.named_parameters():
        if not parameter.is_floating_point() or parameter.element_size() < 2:
            raise ModelError(
                f"{name} is quantized: {parameter_name} is {parameter.dtype}. Use its full-precision weights, or "
                "QLoRA (tuning qlora), which negates the adapter on the full-precision base"
            )


def changed_by_adapter(settings: PeftConfig) -> str | None:
    """What makes PEFT change the original weights when it adds an adapter, so that they aren't back with it off.

    Name and value of the setting; None where the original weights stay as they are.
    """
    if not isinstance(settings, LoraConfig):
        return None
    start = settings.init_lora_weights
    if (start.lower() if isinstance(start, str) else start) not in _FACTORS_ALONE:
        return f"init_lora_weights {start}"
    return "kasa_config" if getattr(settings, "kasa_config", None) else None


def plain_model(model: PreTrainedModel | PeftModel) -> PreTrainedModel:
    """The transformers model inside an adapter, or the model itself."""
    inner = model.get_base_model() if isinstance(model, PeftModel) else model
    assert isinstance(inner, PreTrainedModel)
    return inner


def embedding_weight(model: PreTrainedModel) -> torch.Tensor:
    """``[V, d]``, where a model takes its token ids; its device counts where a model is spread over several."""
    weight = model.get_input_embeddings().weight
    assert isinstance(weight, torch.Tensor)
    return weight


def check_four_bit() -> None:
    """Refuses QLoRA where bitsandbytes is missing.

    Raises:
        ModelError: It is.
    """
    if find_spec("bitsandbytes") is None:
        raise ModelError('tuning qlora needs the package bitsandbytes: pip install "sku-unlearning[gpu]"')


def _check_complete(loading: dict[str, Any], path: str) -> None:
    """Refuses weights that transformers would fill with random numbers, with no more than a warning."""
    odd = sorted(map(str, (*loading.get("missing_keys", ()), *loading.get("mismatched_keys", ()))))
    if odd:
        raise ModelError(
            f"model {path} can't be used: its files lack {len(odd)} weights of the shape that its config asks for, "
            f"the first is {odd[0]}"
        )


def with_path(config: ModelConfig, path: Path | str) -> ModelConfig:
    """The same settings for another folder or hub id, as when the unlearned model of a run is loaded again."""
    return dataclasses.replace(config, path=str(path), revision=None, gguf_file=None)
