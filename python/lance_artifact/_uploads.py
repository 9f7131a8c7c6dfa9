"""Uploads to S3 that were never completed. `object_store` cannot list them: boto3 does, where it is installed."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any
from urllib.parse import urlsplit

from ._lance_artifact import shown_uri
from ._log import LOGGER
from .exceptions import StorageError

# What boto3 calls what Lance's storage options call so, with and without their prefix.
_NAMES = {
    "access_key_id": "aws_access_key_id",
    "secret_access_key": "aws_secret_access_key",
    "session_token": "aws_session_token",
    "token": "aws_session_token",
    "region": "region_name",
    "endpoint": "endpoint_url",
    "endpoint_url": "endpoint_url",
}


class OpenUploads:
    """Of a folder in S3; none where it lies elsewhere, or boto3 is not there or not let, which is logged."""

    def __init__(self, uri: str, storage_options: Any) -> None:
        split = urlsplit(uri)
        # A user and a password are no part of the bucket's name.
        self._bucket, self._prefix = split.netloc.rpartition("@")[2], split.path.strip("/")
        self._client: Any = None
        if split.scheme not in ("s3", "s3a"):
            return
        try:
            import boto3
        except ImportError:
            LOGGER.warning(
                "%s: uploads that were never completed are not looked for, which needs boto3: pip install boto3",
                shown_uri(uri),
            )
            return
        options = storage_options() if callable(storage_options) else storage_options
        given = {}
        for key, value in (options or {}).items():
            name = _NAMES.get(key.lower().removeprefix("aws_"))
            if name is not None:
                given[name] = value
        self._client = boto3.client("s3", **given)

    def below(self, folder: str) -> Iterator[tuple[str, str]]:
        """URI and id of each open upload below a folder. Many who may write to a bucket may not list its uploads: then none, and a warning."""
        if self._client is None:
            return
        prefix = f"{self._prefix}/{folder}/"
        try:
            pages = self._client.get_paginator("list_multipart_uploads").paginate(
                Bucket=self._bucket, Prefix=prefix
            )
            for page in pages:
                for upload in page.get("Uploads", ()):
                    yield f"s3://{self._bucket}/{upload['Key']}", upload["UploadId"]
        except Exception as error:
            self._client = None
            LOGGER.warning(
                "s3://%s/%s: uploads that were never completed are not ended, because the store does not list them: %s",
                self._bucket,
                self._prefix,
                error,
            )

    def abort(self, uri: str, upload: str) -> None:
        """End one; what was uploaded of it is gone. One that has ended meanwhile is no error."""
        key = urlsplit(uri).path.strip("/")
        try:
            self._client.abort_multipart_upload(Bucket=self._bucket, Key=key, UploadId=upload)
        except self._client.exceptions.NoSuchUpload:
            return
        except Exception as error:
            raise StorageError(f"ending the open upload of {uri}: {error}") from error
