"""An S3 server on this machine."""

from __future__ import annotations

import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import boto3

BUCKET = "vectors"


def client(options: dict[str, str]) -> Any:
    return boto3.client(
        "s3",
        endpoint_url=options["aws_endpoint"],
        region_name=options["aws_region"],
        aws_access_key_id=options["aws_access_key_id"],
        aws_secret_access_key=options["aws_secret_access_key"],
    )


@contextmanager
def s3_server(log: Any = subprocess.DEVNULL) -> Iterator[dict[str, str]]:
    """With an empty bucket; gives the storage options. `log` is a file that requests are written to."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
    server = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=log)
    try:
        for _ in range(200):
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", port)) == 0:
                    break
            time.sleep(0.1)
        options = {
            "aws_access_key_id": "key",
            "aws_secret_access_key": "very-secret",
            "aws_region": "us-east-1",
            "aws_endpoint": f"http://127.0.0.1:{port}",
            "allow_http": "true",
        }
        client(options).create_bucket(Bucket=BUCKET)
        yield options
    finally:
        server.kill()
        server.wait()
