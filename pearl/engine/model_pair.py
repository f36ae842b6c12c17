"""Which two models work together: what both say of themselves, checked to fit each other before a weight is read."""

from __future__ import annotations

from dataclasses import dataclass, replace

from pearl.config import EngineConfig, Role
from pearl.errors import ConfigurationError
from pearl.heads import HEAD_NAMES, HeadConfig, head_kind, lone_head, read_head, require_same
from pearl.models import ModelConfig, Tokenizer, bundled_path
from pearl.models.backend import DescribedModel, check_weights, describe_model
from pearl.models.model_source import source_of
from pearl.models.transformers_backend import TransformersConfig
from pearl.models.vocabulary import require_common_core, usable_ids


@dataclass(frozen=True)
class Pair:
    """Both models' shapes, checked to fit each other; the draft's with room for all ids that are used."""

    target: DescribedModel
    draft: DescribedModel | None
    tokenizer: Tokenizer
    vocab_size: int
    max_model_len: int
    head: HeadConfig | None = None  # in the place of a draft model


def model_paths(config: EngineConfig) -> tuple[str, str | None]:
    """Of the target, and of the draft model or head, if there is one; the bundled ones where none is named."""
    draft = (config.draft or str(bundled_path("draft"))) if config.uses_draft_model else None
    return config.target or str(bundled_path("target")), draft


def check_pair(config: EngineConfig, target_path: str, draft_path: str | None) -> Pair:
    """What both paths hold, of which nothing but configurations and tokenizers is read. Raises ConfigurationError."""
    if (own := lone_head(target_path)) is not None:
        raise ConfigurationError(
            f"target={target_path!r} is {HEAD_NAMES[own]}, which drafts for a target; give it as the draft, beside the "
            "target that it was trained for"
        )
    target = _describe(config, "target", target_path)
    tokenizer = Tokenizer.from_pretrained(target_path)
    vocab_size = usable_ids(tokenizer.vocab_size, tokenizer.eos_ids, target.vocab_size)
    longest = target.longest
    draft = None
    head = None if draft_path is None else _read_head(config, draft_path, target)
    if draft_path is not None and head is None:
        draft = _describe(config, "draft", draft_path)
        if isinstance(draft, ModelConfig) and draft.reduced_vocab:  # its ids are the target's, as a head's are
            require_same("a model of some ids,", "vocab_size", draft.vocab_size, target.vocab_size)
        else:
            drafts = Tokenizer.from_pretrained(draft_path).vocabulary
            require_common_core(tokenizer.vocabulary, drafts, min(vocab_size, draft.vocab_size))
        longest = min(longest, draft.longest)
    max_model_len = config.max_model_len or longest
    for model in (target, draft, None if head is None else head.shape):
        if model is not None:
            model.require_length(max_model_len)
    if max_model_len > longest:
        raise ConfigurationError(
            f"max_model_len={max_model_len} is more than the models were made for; lower it to at most {longest}, the "
            "smaller max_position_embeddings of the two, or leave it out"
        )
    return Pair(target, draft, tokenizer, vocab_size, max_model_len, head)


def _read_head(config: EngineConfig, path: str, target: DescribedModel) -> HeadConfig | None:
    """None if the draft is a model of its own. Raises ConfigurationError for a target that cannot serve a head."""
    kind = head_kind(path)
    if kind is None:
        return None
    if config.draft_backend == "transformers":
        raise ConfigurationError(
            f"draft_backend='transformers' is for draft models, and draft={path!r} is {HEAD_NAMES[kind]}; leave it out"
        )
    if not target.hidden:
        raise ConfigurationError(
            f"draft={path!r} reads the target's hidden states, but transformers' {target.architecture} does not hand "
            "over one for each layer; choose a draft model"
        )
    return read_head(path, target)


def _require_lender(draft: ModelConfig, target: DescribedModel) -> None:
    """ConfigurationError if the target's embeddings cannot be the draft's."""
    if not isinstance(target, ModelConfig):
        raise ConfigurationError(
            f"the draft has no embeddings of its own, and transformers' {target.architecture} lends none; take another"
        )
    require_same("a model without embeddings,", "hidden_size", draft.hidden, target.hidden)


def _describe(config: EngineConfig, role: Role, path: str) -> DescribedModel:
    model = describe_model(path, config.resolve_backend(role), config.torch_dtype)
    if role == "target" and isinstance(model, ModelConfig) and model.reduced_vocab:
        raise ConfigurationError(
            f"target={path!r} can say {model.reduced_vocab} of its {model.vocab_size} ids only: it is a draft model; "
            "give it as the draft, beside the target that it was made for"
        )
    _require_fitting_options(config, role, model)
    return model


def _require_fitting_options(config: EngineConfig, role: Role, model: DescribedModel) -> None:
    """Of a model whose matrices are to be rounded or divided: only the native decoder's, and what is quantised already
    is run as it is. Raises ConfigurationError.
    """
    chosen = config.target_weights if role == "target" else config.draft_weights
    if isinstance(model, TransformersConfig):
        used = {f"{role}_weights={chosen!r}": chosen != "full"}
        used["target_parallel"] = role == "target" and config.target_parallel > 1
        if refused := [option for option, is_used in used.items() if is_used]:
            raise ConfigurationError(
                f"{refused[0]} is for models that the native decoder runs; the {role} runs through transformers' "
                f"{model.architecture}: leave it out"
            )
    elif model.quantization is not None and chosen != "full":
        raise ConfigurationError(
            f"{role}_weights={chosen!r} rounds plain weights, but the {role} is quantised already, with "
            f"{model.quantization.method.name}; leave {role}_weights out"
        )


def check_pair_weights(target_path: str, draft_path: str | None, pair: Pair) -> tuple[str, str | None, Pair]:
    """Both models' folders with their weights, and the pair as these are, checked without reading one."""
    target_folder = source_of(target_path).fetch_weights()
    pair = replace(pair, target=check_weights(target_folder, pair.target))
    if draft_path is None or pair.draft is None:
        return str(target_folder), draft_path, pair  # of a head, whose tensors are checked when it is loaded
    draft_folder = source_of(draft_path).fetch_weights()
    draft = check_weights(draft_folder, pair.draft)
    if isinstance(draft, ModelConfig) and draft.borrows_embedding:
        _require_lender(draft, pair.target)
    draft = replace(draft, vocab_size=max(draft.vocab_size, pair.vocab_size))  # it is loaded so (models.widening)
    return str(target_folder), str(draft_folder), replace(pair, draft=draft)
