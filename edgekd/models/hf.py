"""Text classifiers of Hugging Face's transformers library, as `hf.FOLDER`."""

from __future__ import annotations

import importlib
import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from edgekd.errors import ModelError, nearest
from edgekd.models import weights
from edgekd.types import TensorSpec


class TextClassifier(nn.Module):
    """A transformers model that takes ids and mask, and returns its logits alone."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, ids: Tensor, mask: Tensor | None = None) -> Tensor:
        """Ids and mask (batch × time) → logits (batch × classes)."""
        logits: Tensor = self.model(input_ids=ids, attention_mask=mask).logits
        return logits


def hf(
    classes: int, inputs: tuple[TensorSpec, ...], *, name: str, pretrained: str | None = None, **options: Any
) -> TextClassifier:
    """A text classifier of the transformers library, of any architecture it has one for (BERT, ELECTRA, RoBERTa, …).

    Nothing is ever downloaded, and no code that comes with a model is run. A teacher that is trained already takes its
    folder's weights as the recipe's `weights`: FOLDER/model.safetensors.

    Args:
        classes: number of logits.
        inputs: ids and mask, from a tokenizer that fits the model (of the data part `text`: tokenizer = FOLDER).
        name: a folder with a config.json, or the name of a model whose config.json is in the library's local cache.
        pretrained: a local weights file to start from, its classifier left out where it has another one or none.
        options: in place of what the config.json says, e.g. num_hidden_layers = 4.

    Raises:
        ModelError: transformers is not installed, there is no such model, it takes no text, or it cannot be built.
    """
    where = f"hf.{name}"
    try:
        library = importlib.import_module("transformers")
    except ModuleNotFoundError as problem:
        raise ModelError(
            f"it needs the package {problem.name}", where=where, fix="install it with pip install 'edgekd[hf]'"
        ) from problem
    with _silent():
        config = _config(library, name, classes, options, where)
        _check_inputs(inputs, config, where)
        try:
            model = library.AutoModelForSequenceClassification.from_config(config, trust_remote_code=False)
        except Exception as problem:  # whatever the architecture's own code raises on a config it cannot be built from
            raise ModelError(f"transformers cannot build it: {_first_line(problem)}", where=where) from problem
        if pretrained is not None:
            model = _started(model, config, pretrained, where)
    return TextClassifier(model)


@contextmanager
def _silent() -> Iterator[None]:
    """Keep log lines and progress bars of the library, and of what it imports, off the terminal."""
    bars = importlib.import_module("transformers.utils.logging")
    before, shown = logging.root.manager.disable, bars.is_progress_bar_enabled()
    logging.disable(logging.CRITICAL)
    bars.disable_progress_bar()
    try:
        yield
    finally:
        logging.disable(before)
        if shown:
            bars.enable_progress_bar()


def _config(library: Any, name: str, classes: int, options: Mapping[str, Any], where: str) -> Any:
    folder = Path(name).expanduser()
    try:
        config, unused = library.AutoConfig.from_pretrained(
            str(folder) if folder.is_dir() else name,
            local_files_only=True,
            trust_remote_code=False,
            return_unused_kwargs=True,
            num_labels=classes,
            **options,
        )
    except OSError as problem:
        raise ModelError(
            "there is no config.json of that name on this machine",
            where=where,
            expected="a folder",
            fix="fetch a model once with `hf download NAME --local-dir FOLDER`, then name the folder",
        ) from problem
    except Exception as problem:  # a config may be wrong in any way, or want code of its own
        raise ModelError(f"its config.json cannot be used: {_first_line(problem)}", where=where) from problem
    if unused:
        option = min(unused)
        raise ModelError(f"its config has no '{option}'", where=where, nearest=nearest(option, config.to_dict()))
    return config


def _check_inputs(inputs: tuple[TensorSpec, ...], config: Any, where: str) -> None:
    """What the first forward pass would not tell, or only as an index out of range."""
    ids = inputs[0]
    if not ids.dtype.startswith("int") or len(ids.shape) != 2 or len(inputs) > 2:
        given = ", ".join(f"{spec.name} {spec.dtype} {spec.shape}" for spec in inputs)
        raise ModelError(f"it takes ids and a mask, the data has {given}", where=where)
    known, longest = getattr(config, "vocab_size", None), getattr(config, "max_position_embeddings", None)
    if known is not None and ids.values is not None and ids.values > known:
        raise ModelError(
            f"the data has {ids.values:,} ids, the model {known:,}",
            where=where,
            fix="use the model's own tokenizer: set tokenizer in [data] to its folder",
        )
    if isinstance(longest, int) and isinstance(ids.shape[1], int) and ids.shape[1] > longest:
        raise ModelError(
            f"texts have {ids.shape[1]} ids", where=where, expected=f"at most {longest}", fix="lower length"
        )


def _started(model: nn.Module, config: Any, pretrained: str, where: str) -> nn.Module:
    """The model with the weights of a file in its body; the library knows the older names of keys."""
    maker: Any = type(model)
    try:
        started, told = maker.from_pretrained(
            None,
            config=config,
            state_dict=weights.read(pretrained),
            ignore_mismatched_sizes=True,
            output_loading_info=True,
        )
    except ModelError:
        raise
    except Exception as problem:  # a checkpoint may be wrong in any way
        raise ModelError(f"transformers cannot load it: {_first_line(problem)}", where=pretrained) from problem
    body = f"{maker.base_model_prefix}."
    others = [key if isinstance(key, str) else key[0] for key in (*told["missing_keys"], *told["mismatched_keys"])]
    # checkpoints of masked language models have no pooler: it is trained with the classifier
    lost = sorted(key for key in others if key.startswith(body) and not key.startswith(f"{body}pooler."))
    if lost:
        raise ModelError(
            f"{len(lost)} weights of {where} are missing or have another shape, e.g. {lost[0]}",
            where=pretrained,
            fix="it is most likely of another architecture or size",
        )
    made: nn.Module = started
    return made


def _first_line(problem: Exception) -> str:
    return str(problem).strip().splitlines()[0] if str(problem).strip() else type(problem).__name__
