"""The job that writes the merged model of a recipe, unquantized, tensor by tensor."""

from __future__ import annotations

import logging
from pathlib import Path

from torch import nn

from epmq import files, trust
from epmq.common import CommonModel
from epmq.console import progress_bar
from epmq.errors import ConfigError, ModelError, SourceError
from epmq.formats.kinds import quantized_by
from epmq.formats.shards import ShardWriter
from epmq.huggingface import carry_files
from epmq.jobs import model_of, notes_of, open_sources
from epmq.names import NamedForModel
from epmq.recipe import Recipe
from epmq.renames import keeps_name
from epmq.sources import FileSource, iterate, main_dtype, total_bytes

log = logging.getLogger("epmq")


def merge_to_folder(recipe: Recipe, out: str | Path) -> None:
    """Write the merged model of a recipe, tensor by tensor, with configuration and tokenizer files beside.

    Tensors are those of the base's model and are called as in the base's files. Where the base has no config.json of a
    transformers model that can be read, or transformers makes other tensors of the base's as it loads them, all its
    tensors are merged, and all files must call them alike; in the latter case, where they do not, or an adapter is for
    what transformers makes, that is merged and stored.
    """
    if not recipe.experts:
        raise ConfigError("merging needs experts; name them under experts: in the recipe.")
    with files.new_folder(out) as working:
        sources = open_sources(recipe, _model_for_names(recipe))
        merged = sources.merged
        for note in notes_of(sources):
            log.warning(note)
        layout = merged if recipe.merged is not None else sources.base
        stored_name = layout.stored_name if isinstance(layout, NamedForModel) else lambda key: key
        size = total_bytes(merged)
        carry_files(recipe.base, working, main_dtype(merged), sources.class_name)
        # While a shard is put together, its tensors lie there twice.
        files.check_space(out, size + min(size, recipe.shard_bytes))
        writer = ShardWriter(working, recipe.shard_bytes)
        total = len(merged.keys())
        with progress_bar("merging") as progress:
            for number, (key, tensor) in enumerate(iterate(merged), 1):
                writer.add(stored_name(key), tensor)
                progress(key, number, total)
        writer.finish()


def _model_for_names(recipe: Recipe) -> CommonModel | None:
    """The model whose names the tensors go by, or None where they keep those of the files."""
    base = recipe.base
    if not trust.is_file(base / "config.json") or quantized_by(base) is not None:
        return None
    try:
        common = model_of(recipe, fused=True)  # as the base's files have them
        reason = _misfit(recipe, common.skeleton)
    except ModelError as error:
        reason = f"{error} Tensors are merged under the names in the files."
    if reason is None:
        return common
    log.warning(reason)
    return None


def _misfit(recipe: Recipe, model: nn.Module) -> str | None:
    """Why a model's names do not serve for the tensors in the base's files, or None."""
    base, source = recipe.base, FileSource(recipe.base)
    named = NamedForModel(source, model, aliases=True)
    if named.made:
        makes = f"{base}: transformers makes other tensors of these as it loads them"
        if not all(map(keeps_name(model), named.made)) or _call_tensors_alike(recipe):
            return f"{makes}; they are merged as in the files."
        log.warning("%s, and an expert has not all of them; they are merged and stored as it makes them.", makes)
    if missing := sorted(set(model.state_dict()).difference(named.keys())):
        raise ModelError(f"{base}: tensor {missing[0]!r} of config.json's model is missing.")
    return None


def _call_tensors_alike(recipe: Recipe) -> bool:
    """Whether base and experts can be merged under the names in their files."""
    try:
        open_sources(recipe)
    except SourceError:
        return False
    return True
