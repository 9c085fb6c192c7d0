"""`fluvial export`: a finished run as an adapter or a model to publish and to serve."""

import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from fluvial.cli.console import Format, Overrides, print_content, print_line
from fluvial.cli.progress import spinner

if TYPE_CHECKING:
    from fluvial.runs.export import Exported


def export(
    run: Annotated[Path, typer.Argument(help="The folder of a finished run, such as runs/NAME.")],
    to: Annotated[
        Path | None, typer.Option(help="New folder; default RUN/export-FORM.", show_default=False)
    ] = None,
    form: Annotated[
        Literal["peft", "merged", "gguf"] | None,
        typer.Option(
            help="The adapter, or base and adapter as one model; default the adapter, or the model "
            "where all weights were tuned.",
            show_default=False,
        ),
    ] = None,
    base_name: Annotated[
        str | None,
        typer.Option(
            help="Id of the base model on the hub, for a base that was a local folder.",
            show_default=False,
        ),
    ] = None,
    site_names: Annotated[
        bool,
        typer.Option("--site-names", help="Name the sites and their losses in the model card."),
    ] = False,
    site: Annotated[
        str | None,
        typer.Option(
            help="Site whose model is written, after a run that leaves each site its own (fedsa).",
            show_default=False,
        ),
    ] = None,
    dtype: Annotated[
        Literal["auto", "float32", "bfloat16", "float16"],
        typer.Option(help="Type of a merged model; auto is that of the base."),
    ] = "auto",
    overrides: Overrides = None,
    format: Format = "table",
) -> None:
    """Write the adapter or the model of a run, with a model card and without local paths."""
    with spinner("reading the run"):
        from fluvial.runs.export import export_run

        made = export_run(
            run,
            to,
            form=form,
            base=base_name,
            name_sites=site_names,
            dtype=dtype,
            site=site,
            overrides=overrides or [],
        )

    if format == "json":
        check = made.check
        content = {
            "folder": str(made.folder),
            "form": made.form,
            "base": made.base,
            "rank": made.rank,
            "max_lora_rank": made.max_lora_rank,
            "merged_error": None if check is None else check.error,
            "adapter_effect": None if check is None else check.effect,
            "tolerance": None if check is None else check.tolerance,
        }
        print_content(content, format, str)
        return

    for line in _lines(made):
        print_line(line)


def _lines(made: "Exported") -> list[str]:
    """Return what was written, and the calls that load it."""
    path = str(made.folder)
    if made.form != "peft":
        lines = [f"wrote {path}: a model of transformers, with its card README.md"]
        if made.check is not None:
            lines.append(f"its logits {made.check.words}")
        return [
            *lines,
            f"transformers  pipeline('text-generation', model={path!r})",
            f"vLLM          {shlex.join(['vllm', 'serve', path])}",
        ]

    lines = [f"wrote {path}: a LoRA adapter of rank {made.rank}, with its card README.md"]
    base = made.base
    if made.base_folder is None:
        lines.append(f"PEFT  AutoPeftModelForCausalLM.from_pretrained({path!r})")
    else:
        base = shlex.quote(str(made.base_folder))
        loaded = f"AutoModelForCausalLM.from_pretrained({str(made.base_folder)!r})"
        lines += [
            f"PEFT  PeftModel.from_pretrained({loaded}, {path!r})",
            "      its base lies within it, since no hub has that; the card says more",
        ]

    if made.max_lora_rank is not None:
        lines.append(
            f"vLLM  vllm serve {base} --enable-lora --max-lora-rank {made.max_lora_rank} "
            f"--lora-modules {shlex.quote(f'tuned={path}')}"
        )
    return lines
