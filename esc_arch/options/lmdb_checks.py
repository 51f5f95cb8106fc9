"""Whether an LMDB has what its list meta_info.txt says: the names, and the sizes of some of its images."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from esc_arch.data.decoding import image_problem
from esc_arch.data.lmdb_check import lmdb_problem

__all__ = ["check_content"]

Size = tuple[int, int]  # height, width

_IMAGES_DECODED = 16
_AGAIN = "Make it anew: basicsr prepare"


def check_content(path: str, folder: str, listed: Mapping[str, Size | None]) -> Iterator[str]:
    """What is wrong with the LMDB `folder`, at `path` in the option file, whose list names `listed`.

    All keys are looked at; of the images, up to 16 from all over the list are decoded.
    """
    import lmdb

    if (problem := lmdb_problem(folder)) is not None:  # reading on could end the process
        yield f"{path}: {folder!r} is damaged: {problem}. {_AGAIN}"
        return
    try:
        with (
            lmdb.open(folder, readonly=True, lock=False, readahead=False, create=False) as environment,
            environment.begin() as transaction,
        ):
            keys = {key.decode(errors="surrogateescape") for key in transaction.cursor().iternext(values=False)}
            yield from _check_keys(path, folder, keys, listed)
            chosen = list(listed.items())[:: max(1, -(-len(listed) // _IMAGES_DECODED))]
            for key, size in chosen:
                content = transaction.get(key.encode(errors="surrogateescape"))
                if content is not None and (problem := image_problem(content, size)):
                    yield f"{path}: {key!r} in {folder!r} {problem}. {_AGAIN}"
    except lmdb.Error as error:
        yield f"{path}: {folder!r} cannot be read: {error}. {_AGAIN}"


def _check_keys(path: str, folder: str, keys: set[str], listed: Mapping[str, Size | None]) -> Iterator[str]:
    missing, unlisted = [key for key in listed if key not in keys], sorted(keys - listed.keys())
    if missing:
        yield (
            f"{path}: {len(missing)} of the {len(listed)} images that {folder!r} lists in meta_info.txt are missing, "
            f"the first is {missing[0]!r}. {_AGAIN}"
        )
    if unlisted:
        yield (
            f"{path}: {len(unlisted)} of the {len(keys)} images in {folder!r} are not in its meta_info.txt, "
            f"the first is {unlisted[0]!r}. {_AGAIN}"
        )
