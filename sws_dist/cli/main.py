"""Run ``sws COMMAND``: find the command's module, and import no other."""

from __future__ import annotations

import difflib
import sys
from importlib import import_module

import sws_dist
from sws_dist.cli.common import run_command

COMMANDS = {
    "train": "Train a model: a teacher, an auxiliary model with shared weights, a descendant, or one from scratch",
    "expand": "Expand a learngene into a descendant of any depth, ready to be fine-tuned",
    "finetune": "Fine-tune a learngene, a descendant or any timm checkpoint on a folder of one's own labelled images",
    "teach": "Store a teacher's logits for every image that a run will show, so that its students need no teacher",
    "evaluate": "Score a model on a folder of images (<class>/<image>), each image counted once",
    "export": "Export a model to a folder that timm and the Hub read, and to ONNX, torch.export and int8, each checked",
    "classify": "Classify images with a model of one's own, prepared as in an evaluation: the likeliest labels",
    "push": "Put a folder that sws export made on the Hugging Face Hub, where timm finds it as hf-hub:OWNER/NAME",
    "convert": "Convert learngenes and checkpoints: from the paper's released code, and to plain timm",
    "scan": "Read and decode every file of a data set once, and list the bad ones with their reasons",
    "show-batch": "Write a picture of a training batch as the model will see it, with what was drawn for each image",
    "plan": "Plan a run before it is queued: memory, traffic, time, and what its family costs",
    "submit": "Write a SLURM job for a run config, submit it, and say where to watch it",
    "report": "Write a report of families of runs and their picture: accuracy against depth, and the bill",
    "quickstart": "Run the whole method on real images, GPU or none: teacher, auxiliary model, descendants, report",
    "study": "Compare the method with its rivals, and write the report",
}


def main() -> None:
    """Run the command that the command line names. The exit code is the command's own; 2 for a wrong command line."""
    if len(sys.argv) < 2 or sys.argv[1] in ("-h", "--help", "help"):
        print(usage())
    elif sys.argv[1] == "--version":
        print(f"sws-dist {sws_dist.__version__}")
    elif (name := sys.argv[1]) in COMMANDS:
        del sys.argv[1]
        run(name)
    else:
        near = difflib.get_close_matches(name, COMMANDS, n=1)
        hint = f"did you mean {near[0]}?" if near else f"the commands are {', '.join(COMMANDS)}"
        print(f"sws: there is no command {name!r}; {hint}", file=sys.stderr)
        sys.exit(2)


def run(name: str) -> None:
    """Run one command with the arguments of this process."""
    sys.argv[0] = f"sws {name}"  # argparse calls the program by its last part
    run_command(import_module(f"sws_dist.cli.{name.replace('-', '_')}").main)


def usage() -> str:
    """Return the help of ``sws`` itself."""
    width = max(map(len, COMMANDS))
    lines = [f"  {name:{width}}  {about}" for name, about in COMMANDS.items()]
    return "\n".join(
        [
            "usage: sws COMMAND ...",
            "",
            "Train one vision transformer with shared stages, and expand it into a family of them.",
            "",
            "commands:",
            *lines,
            "",
            "sws COMMAND --help explains a command; sws --version prints the version.",
            "On several GPUs or hosts: deepspeed --module sws_dist.cli.train ..., with the arguments of sws train.",
        ]
    )


if __name__ == "__main__":
    main()
