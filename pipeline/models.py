"""From a model reference to a checked model in memory, and to its fingerprint without loading any weights."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import constants, snapshot_download

from pipeline import selftest
from pipeline.adapters import merged, unties
from pipeline.architecture import Architecture, find_architecture
from pipeline.gguf_files import CONVERSION, converted, digest, find_gguf, quiet, text_parts
from pipeline.selftest import Receipt
from store.errors import ModelError
from store.fingerprint import fingerprint
from store.model_ref import ModelRef, is_local

TEXT_PATTERNS = ["*.json", "*.txt", "*.model", "*.jinja"]
WEIGHT_PATTERNS = ["*.safetensors"]
# Second copies of the weights, and other formats, that some repositories hold.
IGNORED_PATTERNS = ["consolidated*", "original/*", "onnx/*", "openvino/*", "gguf/*"]
WEIGHT_FILES = ("model.safetensors", "pytorch_model.bin")  # or their sharded form, each with an index
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "vocab.txt",
    "tekken.json",
)
CHAT_TEMPLATE_FILES = ("chat_template.jinja", "chat_template.json", "additional_chat_templates/*.jinja")
ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors", "adapter_model.bin")
_SAFETENSORS_DTYPES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}


@dataclass(frozen=True, eq=False)
class LoadedModel:
    """A model in evaluation mode without gradients, and what is known about it."""

    ref: ModelRef
    model: Any  # transformers.PreTrainedModel
    tokenizer: Any  # transformers.PreTrainedTokenizerBase, with a pad token
    architecture: Architecture
    fingerprint: str
    receipt: Receipt | None  # of the site self-test; None if it was switched off
    device: torch.device  # where input ids go
    dtype: torch.dtype


def load(ref: ModelRef, device: str | torch.device | None = None, self_test: bool = True) -> LoadedModel:
    """Load a model with its tokenizer, merge its adapter, find its sites and test them.

    ``device`` defaults to the accelerator that torch finds, else the CPU. A GGUF file is converted on first use.

    Raises:
        ModelError: if anything is missing or damaged, the architecture is not supported, or the self-test fails.
    """
    from transformers import AutoModelForCausalLM

    dtype = getattr(torch, compute_dtype(ref))
    tokenizer = load_tokenizer(ref)
    folder = _folder(ref, weights=True)
    with _translated(ref), quiet():
        model, report = AutoModelForCausalLM.from_pretrained(
            folder,
            dtype=dtype,
            trust_remote_code=ref.trust_remote_code,
            attn_implementation=ref.attn_implementation,
            local_files_only=True,
            output_loading_info=True,
        )
        if absent := sorted(report["missing_keys"]):
            raise ModelError(
                f"model {ref.source}: the checkpoint lacks {len(absent)} of the model's weights, for example "
                f"{absent[0]}; transformers would fill them with random numbers. Use a complete checkpoint"
            )
        if ref.adapter is not None:
            model = merged(model, _adapter_folder(ref))
    model = model.to(torch.device(device) if device is not None else default_device())
    model = model.eval().requires_grad_(False)
    architecture = find_architecture(model)
    return LoadedModel(
        ref=ref,
        model=model,
        tokenizer=tokenizer,
        architecture=architecture,
        fingerprint=model_fingerprint(ref),
        receipt=selftest.self_test(model, architecture, tokenizer) if self_test else None,
        device=model.device,
        dtype=model.dtype,
    )


def load_config(ref: ModelRef) -> Any:
    """Return the transformers config, without loading or converting weights.

    Raises:
        ModelError: if it cannot be found or read.
    """
    from transformers import AutoConfig

    folder = _folder(ref, weights=False)
    with _translated(ref), quiet():
        return AutoConfig.from_pretrained(folder, trust_remote_code=ref.trust_remote_code, local_files_only=True)


def generation_settings(ref: ModelRef) -> dict[str, Any]:
    """Return what the model's generation_config.json says; empty where there is none.

    Raises:
        ModelError: if the model cannot be found, or the file cannot be read.
    """
    file = _folder(ref, weights=False) / "generation_config.json"
    if not file.is_file():
        return {}
    try:
        settings = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ModelError(f"{file}: {error}\n  remedy: correct the file, or download the model again") from None
    return settings if isinstance(settings, dict) else {}


def load_tokenizer(ref: ModelRef) -> Any:
    """Return the tokenizer, without loading or converting weights. It has a pad token: EOS if it came without one.

    Raises:
        ModelError: if it cannot be found or read.
    """
    from transformers import AutoTokenizer

    folder = _folder(ref, weights=False)
    with _translated(ref), quiet():
        tokenizer = AutoTokenizer.from_pretrained(
            folder, trust_remote_code=ref.trust_remote_code, local_files_only=True
        )
    if tokenizer.pad_token_id is None:
        if tokenizer.eos_token is None:
            raise ModelError(f"model {ref.source}: its tokenizer has neither a pad nor an EOS token")
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def has_weights(ref: ModelRef) -> bool:
    """Whether the model's weights are on this machine; nothing is downloaded to find out."""
    try:
        if ref.kind == "hub":
            folder = Path(snapshot_download(ref.source, revision=ref.revision, local_files_only=True))
        elif ref.kind == "folder":
            folder = Path(ref.source).expanduser()
        else:
            return True
        return bool(weight_files(folder))
    except (OSError, ValueError, ModelError):
        return False


def model_fingerprint(ref: ModelRef, weights: bool = True) -> str:
    """Return the hash of everything that decides activations: weights, config, adapter, tokenizer, template, dtype.

    Without ``weights`` it is that of the files but these, and no model's: for plans made before a download.

    Paths do not count, so a copy elsewhere has the same fingerprint; nor does what shapes only the rendered text
    (system prompt, template variables), which every row's token ids hold already.

    Raises:
        ModelError: if a file is missing.
    """
    parts: dict[str, object] = {"dtype": compute_dtype(ref)}
    if ref.kind in ("package", "gguf"):
        parts["gguf"] = {"sha256": digest(find_gguf(ref)), "conversion": CONVERSION}  # tokenizer and template included
    else:
        folder = _folder(ref, weights=weights)
        parts["weights"] = _digests(folder, weight_files(folder)) if weights else "not here"
        parts["config"] = _digests(folder, ("config.json",))
        parts["tokenizer"] = _digests(folder, TOKENIZER_FILES)
        parts["chat_template"] = _digests(folder, CHAT_TEMPLATE_FILES)
        if ref.trust_remote_code:
            parts["code"] = _digests(folder, ("*.py",))
    if ref.adapter is not None and weights:
        parts["adapter"] = _digests(_adapter_folder(ref), ADAPTER_FILES)
        if unties(_adapter_folder(ref)):
            parts["untied"] = True  # such adapters were merged into both of two tied weights before
    if ref.attn_implementation is not None:
        parts["attention"] = ref.attn_implementation
    return fingerprint(parts)


def default_device() -> torch.device:
    """Return the accelerator that torch finds, else the CPU."""
    found = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    return found or torch.device("cpu")


def weight_files(folder: Path) -> list[str]:
    """Return the names of a checkpoint's weight files, the index of a sharded one included.

    Raises:
        ModelError: if there are none, or one that the index names is missing.
    """
    for name in WEIGHT_FILES:
        if (folder / name).is_file():
            return [name]
        index = folder / f"{name}.index.json"
        if index.is_file():
            files = [index.name, *sorted(set(json.loads(index.read_text())["weight_map"].values()))]
            for file in files:
                if not (folder / file).is_file():
                    raise ModelError(
                        f"{folder}: {index.name} names {file}, which is missing; copy or download it again"
                    )
            return files
    raise ModelError(
        f"{folder} holds no weights: looked for {', '.join(WEIGHT_FILES)} and their indexes. If it is a hub download "
        "that was cut short, run once more while online"
    )


def model_folder(ref: ModelRef) -> Path:
    """Return a local folder with config, tokenizer and weights, downloaded or converted where it must be.

    Raises:
        ModelError: if that fails.
    """
    return _folder(ref, weights=True)


def _folder(ref: ModelRef, *, weights: bool) -> Path:
    """Return a local folder with config and tokenizer, and with ``weights`` also those."""
    match ref.kind:
        case "package" | "gguf":
            gguf = find_gguf(ref)
            return converted(gguf) if weights else text_parts(gguf)
        case "folder":
            folder = Path(ref.source).expanduser()
            if not (folder / "config.json").is_file():
                raise ModelError(f"model {ref.source}: {folder} is no model folder (it has no config.json)")
            return folder
        case "hub":
            patterns = TEXT_PATTERNS + (WEIGHT_PATTERNS if weights else [])
            return _download(ref.source, ref.revision, patterns + (["*.py"] if ref.trust_remote_code else []))


def _adapter_folder(ref: ModelRef) -> Path:
    assert ref.adapter is not None
    if is_local(ref.adapter):
        folder = Path(ref.adapter).expanduser()
    else:
        folder = _download(ref.adapter, ref.adapter_revision, [*TEXT_PATTERNS, *WEIGHT_PATTERNS])
    if not (folder / "adapter_config.json").is_file():
        raise ModelError(f"adapter {ref.adapter}: {folder} is no PEFT adapter (it has no adapter_config.json)")
    return folder


def _download(repository: str, revision: str | None, patterns: list[str]) -> Path:
    offline = constants.HF_HUB_OFFLINE
    try:
        path = snapshot_download(
            repository,
            revision=revision,
            allow_patterns=patterns,
            ignore_patterns=IGNORED_PATTERNS,
            local_files_only=offline,
        )
    except (OSError, ValueError) as error:  # every error of the hub client is one of these
        at = f" at revision {revision}" if revision else ""
        remedy = (
            "HF_HUB_OFFLINE is set and it is not in the local hub cache: unset it, or download the model first"
            if offline
            else "check the id and the revision, the network, and for a gated model your hub login; "
            "a local folder must start with ./ ../ / or ~"
        )
        raise ModelError(
            f"cannot get {repository}{at} from the hub ({type(error).__name__}: {str(error).splitlines()[0]}); "
            f"remedy: {remedy}"
        ) from error
    return Path(path)


def compute_dtype(ref: ModelRef) -> str:
    """Return the dtype that ``ref`` means, ``auto`` resolved as transformers does: config first, then first weight."""
    if ref.dtype != "auto":
        return ref.dtype
    if ref.kind in ("package", "gguf"):
        return "float32"
    config = load_config(ref)
    dtype = config.dtype or config.get_text_config().dtype
    if dtype is not None:
        return str(dtype).removeprefix("torch.")
    folder = _folder(ref, weights=True)
    from safetensors import safe_open

    for file in weight_files(folder):
        if file.endswith(".safetensors"):
            with safe_open(folder / file, framework="pt") as tensors:
                for name in tensors.keys():  # noqa: SIM118 (safe_open is no mapping)
                    if (found := tensors.get_slice(name).get_dtype()) in _SAFETENSORS_DTYPES:
                        return _SAFETENSORS_DTYPES[found]
    raise ModelError(f"model {ref.source}: neither its config nor its weights say a dtype; set dtype in the study")


def _digests(folder: Path, patterns: tuple[str, ...] | list[str]) -> dict[str, str]:
    paths = sorted({path for pattern in patterns for path in folder.glob(pattern) if path.is_file()})
    return {path.relative_to(folder).as_posix(): digest(path) for path in paths}


@contextmanager
def _translated(ref: ModelRef) -> Iterator[None]:
    """Turn what transformers, peft and safetensors raise for bad files into a `ModelError`."""
    try:
        yield
    except ModelError:
        raise
    except Exception as error:
        lines = str(error).strip().splitlines() or [""]
        raise ModelError(
            f"cannot load {ref.source}{f' with adapter {ref.adapter}' if ref.adapter else ''}: "
            f"{type(error).__name__}: {' '.join(lines[:3])}"
        ) from error
