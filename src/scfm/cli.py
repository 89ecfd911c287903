"""The command line: argument parsing only."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence


def main(argv: Sequence[str] | None = None) -> int:
    """Run ``scfm``; returns the exit status."""
    args = _parser().parse_args(argv)
    from . import settings

    if args.quiet:
        settings.verbosity = 1
    try:
        args.run(args)
    except (OSError, ValueError, KeyError, RuntimeError, ImportError, MemoryError, TypeError) as error:
        if args.debug:
            raise
        message = error.args[0] if isinstance(error, KeyError) and error.args else error
        print(f"scfm: {message}", file=sys.stderr)
        return 1
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="scfm", description="Single-cell foundation models for Scanpy users.")
    parser.add_argument("--version", action=_Version)
    parser.add_argument("--debug", action="store_true", help="show the full trace of an error")
    parser.add_argument("-q", "--quiet", action="store_true", help="only warnings and errors")
    commands = parser.add_subparsers(required=True, metavar="command")

    demo = commands.add_parser("demo", help="embed bundled cells with a bundled model; needs no network")
    demo.add_argument("-o", "--out", default=".", type=Path, help="folder for scfm_demo.h5ad and scfm_demo.png")
    demo.add_argument("--all", action="store_true", help="all bundled models instead of one")
    demo.set_defaults(run=_demo)

    models = commands.add_parser("models", help="list all checkpoints, or show one")
    models.add_argument("name", nargs="?", help="show licence, files and citation of this checkpoint")
    models.set_defaults(run=_models)

    embed = commands.add_parser("embed", help="embed the cells of an .h5ad file")
    embed.add_argument("input", type=Path, help=".h5ad file with counts")
    embed.add_argument("-m", "--model", default="scgpt", help="name of scfm models, or a checkpoint folder")
    embed.add_argument("-o", "--out", required=True, type=Path, help=".h5ad file to write")
    embed.add_argument("--layer", help="layer with the counts (default X)")
    embed.add_argument("--pooling", help="how token states become one vector per cell")
    embed.add_argument("--weights", help="weight set of a checkpoint that holds several")
    embed.add_argument("--key-added", help="slot of obsm and uns (default X_<model>, <model>)")
    embed.add_argument("--gene-symbols", help="column of var with gene symbols")
    embed.add_argument("--gene-ids", help="column of var with Ensembl ids")
    embed.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, mps")
    embed.add_argument("--precision", default="auto", help="auto, float32, bfloat16, float16")
    embed.add_argument("--batch-size", type=int, help="most cells in one forward pass")
    embed.set_defaults(run=_embed)

    pretrain = commands.add_parser("pretrain", help="train a backbone with a YAML recipe, from scratch or further")
    pretrain.add_argument("recipe", type=Path, help="YAML file, see scfm.train.Recipe")
    pretrain.add_argument("-o", "--out", required=True, type=Path, help="folder for the new checkpoint")
    pretrain.add_argument("--checkpoint", help="name or folder of a model to train further")
    pretrain.add_argument("--max-steps", type=int, help="optimiser steps")
    pretrain.add_argument("--max-epochs", type=int, help="passes over the cells")
    pretrain.add_argument("--accumulate", type=int, help="micro-batches of each process in an optimiser step")
    pretrain.add_argument("--accelerator", default="auto", help="auto, cpu, gpu, mps")
    pretrain.add_argument("--devices", default="1", help="number of devices on each node, or auto")
    pretrain.add_argument("--num-nodes", type=int, default=1)
    pretrain.add_argument("--strategy", default="auto", help="auto, ddp, fsdp")
    pretrain.add_argument("--precision", help="32-true, bf16-mixed, 16-mixed")
    pretrain.add_argument("--gradient-checkpointing", action=argparse.BooleanOptionalAction, help="save memory")
    pretrain.add_argument(
        "--resume", action=argparse.BooleanOptionalAction, help="go on with the run in OUT (default: if there is one)"
    )
    pretrain.add_argument("--tensorboard", action="store_true", help="write event files, too")
    pretrain.set_defaults(run=_pretrain)
    return parser


class _Version(argparse.Action):
    def __init__(self, option_strings: Sequence[str], dest: str) -> None:
        super().__init__(option_strings, dest, nargs=0, help="show the version")

    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> None:
        from . import __version__

        print(__version__)
        parser.exit()


def _demo(args: argparse.Namespace) -> None:
    from .demo import run

    scores = run(args.out, models="all") if args.all else run(args.out)
    print(scores.round(3).to_string())
    print(f"\nwrote {args.out / 'scfm_demo.h5ad'} and {args.out / 'scfm_demo.png'}")


def _models(args: argparse.Namespace) -> None:
    from . import checkpoints

    print(checkpoints.list().to_string() if args.name is None else checkpoints.info(args.name))


def _embed(args: argparse.Namespace) -> None:
    import anndata

    from . import tl

    if args.out.suffix != ".h5ad":
        msg = f"--out must end in .h5ad; got {args.out}"
        raise ValueError(msg)
    if not args.input.is_file():
        msg = f"no file {args.input}"
        raise FileNotFoundError(msg)
    adata = anndata.read_h5ad(args.input)
    tl.embed(
        adata,
        args.model,
        layer=args.layer,
        pooling=args.pooling,
        weights=args.weights,
        key_added=args.key_added,
        gene_symbols=args.gene_symbols,
        gene_ids=args.gene_ids,
        device=args.device,
        precision=args.precision,
        batch_size=args.batch_size,
    )
    partial = args.out.with_suffix(".partial.h5ad")
    adata.write_h5ad(partial, compression="gzip")
    partial.replace(args.out)


def _pretrain(args: argparse.Namespace) -> None:
    from .train import pretrain

    pretrain(
        args.recipe,
        checkpoint=args.checkpoint,
        out=args.out,
        resume="auto" if args.resume is None else args.resume,
        accelerator=args.accelerator,
        devices=int(args.devices) if args.devices.isdigit() else args.devices,
        strategy=args.strategy,
        num_nodes=args.num_nodes,
        precision=args.precision,
        accumulate=args.accumulate,
        gradient_checkpointing=args.gradient_checkpointing,
        max_steps=args.max_steps,
        max_epochs=args.max_epochs,
        loggers=("csv", "tensorboard") if args.tensorboard else ("csv",),
    )


if __name__ == "__main__":
    sys.exit(main())
