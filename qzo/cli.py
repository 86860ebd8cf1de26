"""The command line: `qzo VERB`. Heavy imports live inside the verbs."""

import argparse
import os
import shlex
import sys
import warnings

from qzo.errors import QzoError

EPILOG = """exit codes: 0 done, 1 the run failed, 2 bad input, 3 out of memory,
130/143 interrupted after writing what was learned

  qzo quantize meta-llama/Llama-2-13b-hf -o llama-13b-w4 --calibration texts.jsonl
  qzo tune qzo-llama-2-13b-w4 model=llama-13b-w4 data=sst2/
  qzo evaluate runs/qzo-llama-2-13b-w4-seed0
  qzo export runs/qzo-llama-2-13b-w4-seed0 -o llama-13b-w4-sst2"""

EXPORTS = ("gptq", "gptq_v2", "awq", "compressed-tensors", "bitsandbytes-8bit", "bitsandbytes-4bit", "aqlm", "hf", "peft", "packed", "zeroqat")
DISK = "Check the path, its permissions and the space on the disk, then start again; a run goes on from its journal."
MEMORY = {
    "quantize": "Use --device cpu, a smaller --max-length, or no --reconstruct, and add --restart; with more memory, the same command continues.",
    "tune": "Lower micro_batch or max_length, or use device=cpu, and add --restart; with more memory, the same command continues.",
    "evaluate": "Lower --batch-size or --max-length, or use --device cpu.",
} | dict.fromkeys(("export", "replay", "recipes", "doctor"), "Use a machine or a device with more memory.")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="qzo", description="Fine-tune quantized language models without a backward pass.",
        epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    verbs = parser.add_subparsers(dest="verb", metavar="VERB", required=True)
    for add in (_add_quantize, _add_tune, _add_evaluate, _add_export, _add_replay, _add_recipes, _add_doctor):
        add(verbs)
    return parser


def _add_quantize(verbs: argparse._SubParsersAction) -> None:
    p = verbs.add_parser("quantize", help="a 16-bit model in, a GPTQ, bitsandbytes or ZeroQAT checkpoint out; the same command continues")
    p.add_argument("model", metavar="MODEL", help="model folder, hub id, or builtin:tiny-llama")
    p.add_argument("-o", "--out", required=True, help="new folder for the quantized model")
    p.add_argument("--method", choices=("gptq", "rtn", "int8", "nf4", "fp4", "zeroqat"), default="gptq",
                   help="gptq and zeroqat need --calibration; int8, nf4 and fp4 are those of bitsandbytes (default: gptq)")  # fmt: skip
    p.add_argument("--bits", type=int, choices=(2, 3, 4, 6, 8), help="6: zeroqat alone (default: 4, for int8 8)")
    p.add_argument("--activations", type=int, choices=(4, 6, 8, 16), help="bits of activations, for zeroqat (default: 16, not quantized)")
    p.add_argument("--no-compensation", action="store_true", help="zeroqat: leave the latents where the weights are, not where GPTQ would round to")
    p.add_argument("--reconstruct", type=int, default=0, metavar="EPOCHS",
                   help="zeroqat: then move each layer's quantizer along gradients, back-propagated through that layer (default: 0, none)")  # fmt: skip
    p.add_argument("--group-size", type=int, choices=(128, 64, 32, -1),
                   help="columns per scale; -1: whole rows (default: 128, for nf4 and fp4 64, for zeroqat with low-bit activations -1)")  # fmt: skip
    sym = p.add_mutually_exclusive_group()
    sym.add_argument("--sym", dest="sym", action="store_true", default=None, help="zero point in the middle (default of gptq and rtn)")
    sym.add_argument("--asym", dest="sym", action="store_false", default=None, help="a zero point per group, as zeroqat always has")
    p.add_argument("--desc-act", action="store_true", help="gptq: quantize columns in order of activation size")
    p.add_argument("--format", choices=("gptq", "gptq_v2"), help="checkpoint format of gptq and rtn (default: gptq)")
    p.add_argument("--calibration", metavar="FILE", help="texts for gptq and zeroqat: jsonl with `text`, or a .txt file")
    p.add_argument("--samples", type=int, default=128, help="calibration windows (default: 128)")
    p.add_argument("--max-length", type=int, default=512, help="tokens per calibration window (default: 512)")
    p.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    p.add_argument("--restart", action="store_true", help="start over; the layers that an interrupted run has done are discarded")
    p.set_defaults(run=_quantize)


def _quantize(args: argparse.Namespace) -> None:
    from qzo.progress import Progress
    from qzo.quantize import quantize_model

    shown: dict[str, Progress] = {}

    def progress(done: int, total: int, text: str) -> None:
        if "bar" not in shown:
            shown["bar"] = Progress("quantize", total, done)
        word, _, rest = text.partition(" ")
        shown["bar"].update(done, **{word: rest} if word == "continues" else {"at": text})

    summary = quantize_model(
        args.model, args.out, args.method, args.bits, args.group_size, args.sym, args.desc_act, args.format,
        args.calibration, args.samples, args.max_length, args.device, progress, args.restart, args.activations, not args.no_compensation, args.reconstruct,
    )  # fmt: skip
    if "bar" in shown:
        shown["bar"].close()
    print(f"{args.out}: " + ", ".join(f"{key.replace('_', ' ')} {_number(value)}" for key, value in summary.items()))


def _number(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _add_tune(verbs: argparse._SubParsersAction) -> None:
    p = verbs.add_parser("tune", help="tune a quantized model by a recipe; the same command continues a run")
    p.add_argument("recipe", metavar="RECIPE", help="name of a shipped recipe (see `qzo recipes`) or a YAML file")
    p.add_argument("overrides", metavar="key=value", nargs="*", help="recipe keys to set, e.g. model=FOLDER seed=1")
    p.add_argument("--dry-run", action="store_true", help="show what would be run, and its size, and stop")
    p.add_argument("--restart", action="store_true", help="start over; an existing run folder is kept under another name")
    p.set_defaults(run=_tune)


def _tune(args: argparse.Namespace) -> None:
    from qzo.recipe import load_recipe, run_name

    recipe, name = load_recipe(args.recipe, args.overrides), run_name(args.recipe)
    if args.dry_run:
        from qzo.plan import plan

        return plan(recipe, name, args.restart)
    from qzo.report import table
    from qzo.tune import tune_model

    command = shlex.join(["qzo", "tune", args.recipe, *args.overrides])
    folder, figures = tune_model(recipe, name, restart=args.restart, command=command)
    print(f"{folder}/report.md\n\n{table(figures)}")


def _add_evaluate(verbs: argparse._SubParsersAction) -> None:
    p = verbs.add_parser("evaluate", help="accuracy on a task, or perplexity on a text, of a model or a run")
    p.add_argument("model", metavar="MODEL_OR_RUN", help="16-bit or quantized folder, hub id, or the folder of a run")
    what = p.add_mutually_exclusive_group()
    what.add_argument("--task", metavar="NAME", help="sst2, rte, cb, boolq, copa, wic, squad, messages or text (default for a run: its own)")
    what.add_argument("--recipe", metavar="RECIPE", help="take task, data and split from a recipe")
    what.add_argument("--perplexity", metavar="FILE", help="a text file")
    what.add_argument("--lm-eval", metavar="TASKS", help="tasks of lm-evaluation-harness, and folders (./FOLDER) of such")
    p.add_argument("--data", metavar="FOLDER", help="folder of SPLIT.jsonl files, a .jsonl file, or a hub id; of a text also SPLIT.txt, or a .txt file")
    p.add_argument("--split", help="default: validation")
    p.add_argument("--limit", type=_positive, help="evaluate the first LIMIT examples")
    p.add_argument("--window", type=_positive, default=512, help="tokens per window of --perplexity (default: 512)")
    p.add_argument("--limit-windows", type=_positive, help="evaluate the first windows only")
    p.add_argument("--max-length", type=_positive, help="tokens per row (default: 512, or the run's)")
    p.add_argument("--batch-size", type=_positive, default=32, help="examples per forward (default: 32)")
    p.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    p.add_argument("--dtype", choices=("auto", "bf16", "fp16", "fp32"), help="default: auto, or the run's")
    p.add_argument("--json", action="store_true", help="print one JSON object")
    p.set_defaults(run=_evaluate)


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"given {text}, expected a positive whole number")
    return int(text)


def _evaluate(args: argparse.Namespace) -> None:
    figures = _measured(args)
    if args.json:
        import json

        print(json.dumps(figures))
    else:
        shown = {key if args.lm_eval else key.replace("_", " "): value for key, value in figures.items()}
        print("\n".join(f"{key}: {_number(value)}" for key, value in shown.items()))


def _measured(args: argparse.Namespace) -> dict[str, object]:
    if args.lm_eval:
        from qzo.harness import evaluate_harness

        tasks = [task.strip() for task in args.lm_eval.split(",")]
        return evaluate_harness(args.model, tasks, args.device, args.dtype, args.limit, args.batch_size, args.max_length)
    from qzo.score import Question, score

    fields = ("task", "recipe", "perplexity", "data", "split", "limit", "window", "limit_windows", "max_length", "batch_size")
    return score(args.model, Question(**{name: getattr(args, name) for name in fields}), args.device, args.dtype)


def _add_export(verbs: argparse._SubParsersAction) -> None:
    p = verbs.add_parser("export", help="write a run's tuned model as an ordinary checkpoint")
    p.add_argument("run_folder", metavar="RUN", help="the folder of a run, or of what quantize --method zeroqat wrote")
    p.add_argument("-o", "--out", required=True, help="new folder for the model")
    p.add_argument("--format", choices=EXPORTS,
                   help="default: the base checkpoint's, peft for adapters, packed for zeroqat; hf: dequantized 16 bits")  # fmt: skip
    p.add_argument("--push", metavar="REPO_ID", help="upload it to the Hugging Face Hub; a repository that must be private has to exist")
    p.set_defaults(run=_export, to=None, snapshots=True)


def _export(args: argparse.Namespace) -> None:
    from qzo.export import export_run, verify
    from qzo.hub import check_push, push

    if args.push:
        check_push(args.push)
    summary = export_run(args.run_folder, args.out, args.format, args.to, args.snapshots, args.push)
    _say_exported(args.out, summary, verify(args.run_folder, args.out, to=args.to))
    if args.push:
        print(f"pushed: {push(args.out, args.push)}")


def _say_exported(out: str, summary: dict, checked: dict) -> None:
    if not checked:
        print(f"{out}: adapters for peft, {summary['steps']} steps applied; read again: the run's tensors")
        return
    if "said" in checked:
        print(f"{out}: {checked['format']}, {summary['steps']} steps applied\nreloaded: {checked['said']}")
        return
    same = "equal" if checked["equal"] else "not bit-equal (16-bit weights round each product)"
    print(f"{out}: {summary['format']}, {summary['steps']} steps applied")
    rounding = f"; rounding scales to {summary['scales']} moves a scale by at most {summary['rounding']:.2g} of itself and a logit by at most "
    rounding += f"{checked['rounding_difference']:.3g} (largest logit {checked['largest_logit']:.3g})"
    print(f"reloaded: logits {same}{rounding if summary['scales'] else ''}")


def _add_replay(verbs: argparse._SubParsersAction) -> None:
    p = verbs.add_parser("replay", help="rebuild the tuned tensors from the journal and the base model alone")
    p.add_argument("run_folder", metavar="RUN")
    p.add_argument("--to", type=int, metavar="STEP", help="apply the first STEP steps (default: all)")
    p.add_argument("--verify", action="store_true", help="compare with the hash of the newest snapshot up to there")
    p.add_argument("-o", "--out", help="write the replayed model to a new folder, as export does")
    p.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    p.set_defaults(run=_replay)


def _replay(args: argparse.Namespace) -> None:
    from qzo.replay import replay_run

    for line in replay_run(args.run_folder, args.to, args.verify, args.device):
        print(line)
    if args.out:
        _export(argparse.Namespace(run_folder=args.run_folder, out=args.out, format=None, to=args.to, snapshots=False, push=None))


def _add_recipes(verbs: argparse._SubParsersAction) -> None:
    p = verbs.add_parser("recipes", help="list the shipped recipes; print one")
    p.add_argument("name", metavar="NAME", nargs="?")
    p.set_defaults(run=_recipes)


def _recipes(args: argparse.Namespace) -> None:
    from qzo.recipe import shipped, shipped_text

    if args.name:
        print(shipped_text(args.name), end="")
        return
    names = shipped()
    width = max(len(name) for name, _ in names)
    print("\n".join(f"{name:<{width}}  {about}" for name, about in names))


def _add_doctor(verbs: argparse._SubParsersAction) -> None:
    p = verbs.add_parser("doctor", help="versions, devices, what is missing, a ten-second self-test")
    p.set_defaults(run=_doctor)


def _doctor(args: argparse.Namespace) -> None:
    from qzo.doctor import doctor

    doctor()


def _warn(message: Warning | str, *_: object) -> None:
    print(f"warning: {message}", file=sys.stderr)


def _parse(argv: list[str] | None) -> argparse.Namespace:
    parser = _parser()
    args, rest = parser.parse_known_args(argv)
    if args.verb == "tune":  # argparse does not take the key=value that follow an option
        args.overrides += [item for item in rest if not item.startswith("-")]
        rest = [item for item in rest if item.startswith("-")]
    if rest:
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    return args


def main(argv: list[str] | None = None) -> int:
    """Run one verb; returns the exit code."""
    args = _parse(argv)
    warnings.showwarning = _warn
    # Deterministic cuBLAS needs it before CUDA starts.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    if "PYTORCH_ALLOC_CONF" not in os.environ:
        # Segments that grow page by page: rounded up one by one, a model's tensors take 3 % more.
        os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
    try:
        args.run(args)
        return 0
    except QzoError as error:
        print(f"qzo {args.verb}: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print(f"qzo {args.verb}: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:
        sys.stderr.close()
        return 141
    except OSError as error:
        where, reason = error.filename or "a file", error.strerror or str(error)
        print(f"qzo {args.verb}: {where}: cannot be read or written ({reason}). {DISK}", file=sys.stderr)
        return 1
    except (MemoryError, RuntimeError) as error:
        reason = str(error).partition("\n")[0]
        # PyTorch's CPU allocator raises a plain RuntimeError.
        if not isinstance(error, MemoryError) and type(error).__name__ != "OutOfMemoryError" and "can't allocate" not in reason:
            raise
        print(f"qzo {args.verb}: out of memory ({reason or 'the host has no more'}). {MEMORY[args.verb]}", file=sys.stderr)
        return 3


if __name__ == "__main__":
    sys.exit(main())
