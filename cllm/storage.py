"""Copies of finished output folders in an object store: S3, Google Cloud Storage, or any file system of pyarrow.

A run works in folders of a file system, with locks and renames; a store has neither. So a folder is copied when it is
finished, its manifest last: what has no manifest in the store is not there. On the way back everything that the
manifest lists is checked before the folder takes its place.
"""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
from pyarrow.fs import FileSystem, FileType, LocalFileSystem, copy_files

from cllm.artifacts import MANIFEST_NAME, Manifest, read_manifest, write_artifact, write_atomic
from cllm.errors import InputError


@dataclass(frozen=True, slots=True)
class Storage:
    """Where copies lie: `root` of a file system, a folder below it for each artifact. `uri` is for messages."""

    uri: str
    filesystem: FileSystem
    root: str

    @classmethod
    def open(cls, uri: str) -> "Storage":
        """A store by its URI: s3://bucket/prefix, gs://bucket/prefix, file:///folder; options of pyarrow behind "?".

        Raises:
            InputError: an unknown scheme, a malformed URI, or a bucket that cannot be found.
        """
        with _named(uri):
            filesystem, root = FileSystem.from_uri(uri)
        return cls(uri, filesystem, root.rstrip("/"))

    def manifest(self, name: str, kind: str) -> Manifest | None:
        """That of the finished copy called `name`; None if there is none, or one whose last file was cut off.

        Raises:
            InputError: the store cannot be read, or holds something else under this name.
        """
        where = f"{self.root}/{name}/{MANIFEST_NAME}"
        with _named(self.uri):
            if self.filesystem.get_file_info(where).type == FileType.NotFound:
                return None
            with self.filesystem.open_input_stream(where) as file:
                text = file.read()
        try:
            data = json.loads(text)
        except ValueError:  # file systems, unlike object stores, show a file before it is whole
            return None
        manifest = Manifest.from_data(data, where=f"storage {self.uri}: {where}")
        if manifest.kind != kind:
            raise InputError(f"storage {self.uri}: {where}: holds {manifest.kind}, expected {kind}")
        return manifest

    def put(self, folder: Path, kind: str) -> bool:
        """Copy the artifact `folder`, unless this very one is there already; returns whether anything was copied.

        A copy of an older one is unfinished from the first change on; killed at any point, none looks finished.

        Raises:
            InputError: `folder` is no valid artifact, or the store cannot be written.
        """
        ours, theirs = read_manifest(folder, kind), self.manifest(folder.name, kind)
        if ours == theirs:
            return False
        target = f"{self.root}/{folder.name}"
        with _named(self.uri):
            if theirs is not None:
                self._remove_copy(target, theirs)
            for path in (*(entry.path for entry in ours.files), MANIFEST_NAME):
                self._upload(folder / path, f"{target}/{path}")
        return True

    def get(self, folder: Path, manifest: Manifest) -> None:
        """Make `folder` from the copy that `manifest` describes; it appears when all of its files have been checked.

        Raises:
            InputError: the store cannot be read, or a file of the copy is missing or not what the manifest says.
        """
        made = write_artifact(folder, kind=manifest.kind, inputs=manifest.inputs, provenance=manifest.provenance)
        with made as working:
            for entry in manifest.files:
                (working / entry.path).parent.mkdir(parents=True, exist_ok=True)
                with _named(self.uri):
                    copy_files(
                        f"{self.root}/{folder.name}/{entry.path}",
                        str(working / entry.path),
                        source_filesystem=self.filesystem,
                        destination_filesystem=LocalFileSystem(),
                    )
            write_atomic(working / MANIFEST_NAME, manifest.model_dump_json(indent=1))
            read_manifest(working, manifest.kind)

    def _remove_copy(self, target: str, manifest: Manifest) -> None:
        """Only files that a manifest of ours lists, and it before them: the prefix may be mistyped."""
        for path in (MANIFEST_NAME, *(entry.path for entry in manifest.files)):
            if self.filesystem.get_file_info(f"{target}/{path}").type != FileType.NotFound:
                self.filesystem.delete_file(f"{target}/{path}")

    def _upload(self, source: Path, target: str) -> None:
        if isinstance(self.filesystem, LocalFileSystem):  # object stores have no folders
            self.filesystem.create_dir(target.rpartition("/")[0], recursive=True)
        copy_files(str(source), target, source_filesystem=LocalFileSystem(), destination_filesystem=self.filesystem)


@contextmanager
def _named(uri: str) -> Iterator[None]:
    """What a store refuses is the user's to mend: a bucket, a key, a network."""
    try:
        yield
    except (OSError, ValueError, pa.ArrowException) as error:
        raise InputError(f"storage {uri}: {str(error).splitlines()[0]}") from error
