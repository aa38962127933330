"""Data at a URL, in an object store or on the web: what fsspec can reach, brought here for as long as it is read."""

from collections.abc import Callable
from pathlib import Path, PurePosixPath
from typing import Any

from lizard_jax.errors import UserError, first_line


def is_url(path: str) -> bool:
    """Whether a path names another place than this machine's file system."""
    return "://" in path


def bring(url: str, folder: Path, wanted: Callable[[Path], bool]) -> Path:
    """The file at a URL, or the directory with those of its files that are ``wanted`` by their path in it, in a folder.

    Raises:
        UserError: nothing is there, it cannot be reached, or fsspec knows no such store or lacks its package.
    """
    import fsspec
    from fsspec.callbacks import TqdmCallback

    def copy(store: Any, name: str, target: Path) -> Path:
        target.parent.mkdir(parents=True, exist_ok=True)
        bar = {"unit": "B", "unit_scale": True, "desc": target.name, "disable": None, "leave": False}
        store.get_file(name, str(target), callback=TqdmCallback(tqdm_kwargs=bar))
        return target

    try:
        store, root = fsspec.url_to_fs(url)
        # On the web nothing is a directory; asked for one, fsspec reads a file whole and looks for links in it.
        if is_url(root) or not store.isdir(root):
            return copy(store, root, folder / (PurePosixPath(root.partition("?")[0]).name or "data"))
        inside = {name: Path(PurePosixPath(name).relative_to(PurePosixPath(root))) for name in store.find(root)}
        for name, relative in inside.items():
            if wanted(relative):
                copy(store, name, folder / "all" / relative)
        (folder / "all").mkdir(exist_ok=True)
        return folder / "all"
    except FileNotFoundError:
        raise UserError(f"no data at {url}: there is no such file or directory") from None
    except Exception as error:  # each store raises errors of its own
        raise UserError(f"cannot read {url}: {first_line(error)}") from None
