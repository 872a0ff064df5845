"""Put a folder that sws export made on the Hugging Face Hub, where timm finds it as hf-hub:OWNER/NAME.

examples:
  hf auth login                                       # once; or put the token into HF_TOKEN
  sws push exported/pets --repo me/pets --private
"""

from __future__ import annotations

import logging
from importlib.util import find_spec
from pathlib import Path

import yaml

from sws_dist.cli.common import make_parser, parse_args, print_result
from sws_dist.errors import RunError
from sws_dist.text import read_text

FILES = ("config.json", "model.safetensors", "README.md")

log = logging.getLogger(__name__)


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("folder", type=Path, help="what sws export made")
    parser.add_argument("--repo", required=True, metavar="OWNER/NAME", help="where on the Hub; made if it is not there")
    parser.add_argument("--private", action="store_true", help="make a repository that only its owner sees")
    parser.add_argument("--message", default="Upload a model with sws push", help="of the commit")
    args = parse_args(parser, one_process=True)
    if missing := [name for name in FILES if not (args.folder / name).is_file()]:
        raise ValueError(f"{args.folder}: has no {', '.join(missing)}; sws export makes such a folder")
    if find_spec("huggingface_hub") is None:
        raise ValueError("missing: huggingface_hub; pip install huggingface_hub brings it")
    if not has_license(args.folder):
        log.warning(f"{args.folder}/README.md names no license, so nobody may use the model; sws export --license does")
    print_result(f"{push(args.folder, args.repo, args.private, args.message)}: timm opens it as hf-hub:{args.repo}")


def has_license(folder: Path) -> bool:
    """Return True if the head of the model card names a license."""
    parts = read_text(folder / "README.md").split("---\n", 2)
    try:
        head = yaml.safe_load(parts[1]) if len(parts) == 3 else None
    except yaml.YAMLError as error:
        raise ValueError(f"{folder}/README.md: its head is no YAML ({error})") from None
    return isinstance(head, dict) and bool(head.get("license"))


def push(folder: Path, repo: str, private: bool, message: str) -> str:
    """Upload a folder as one commit.

    Returns:
        The repository's address.

    Raises:
        ValueError: a name that the Hub does not take, or no token.
        RunError: the Hub cannot be reached, or refused.
    """
    from huggingface_hub import HfApi, get_token
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(repo)
    except HFValidationError as error:
        raise ValueError(f"--repo {repo}: {error}") from None
    if repo.count("/") != 1:
        raise ValueError(f"--repo {repo}: expected OWNER/NAME")
    if get_token() is None:
        raise ValueError("no token for the Hub: hf auth login asks for one, or put it into HF_TOKEN")
    api = HfApi(library_name="sws-dist")
    try:
        address = api.create_repo(repo, private=private, exist_ok=True)
        is_public = private and not api.repo_info(repo).private  # it was there before
        if not is_public:
            api.upload_folder(repo_id=repo, folder_path=folder, commit_message=message)
    except Exception as error:  # of the network, of the Hub, and its own, which have no common base
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise RunError(f"{repo}: could not be pushed to {api.endpoint} ({reason})") from error
    if is_public:
        raise ValueError(f"--private: {repo} is there already, and public; nothing was uploaded")
    return str(address)
