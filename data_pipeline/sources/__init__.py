"""Clients for files in a remote folder: one request, one answer, no second try.

`open_source` picks by the location's scheme:

- http://, https://: our own client on http.client. Name and password in the URL are sent as Basic
  authorization, a query (a signed folder, such as an Azure SAS) is added to each file's URL, and
  the proxies of the environment (HTTPS_PROXY, NO_PROXY) and SSL_CERT_FILE are honoured.
- s3://bucket/folder, gs://bucket/folder, az://container/folder: obstore (espalier[remote]).
  Credentials come from the environment alone, or from the machine's role:
  AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY, AWS_SESSION_TOKEN, AWS_REGION, AWS_ENDPOINT_URL (another
  S3 server), AWS_ALLOW_HTTP=true (one without TLS), AWS_SKIP_SIGNATURE=true (a public bucket);
  GOOGLE_APPLICATION_CREDENTIALS or GOOGLE_SERVICE_ACCOUNT; AZURE_STORAGE_ACCOUNT_NAME with
  AZURE_STORAGE_ACCOUNT_KEY or AZURE_STORAGE_SAS_TOKEN. The profiles of ~/.aws are not read; hand
  one over with: eval "$(aws configure export-credentials --format env)".
- pipe:COMMAND {name}: standard output of a command, started without a shell.
"""

from __future__ import annotations

import re
from urllib.parse import urlsplit

from data_pipeline.sources.base import Answer, Changed, Source, TransientFault, printable
from data_pipeline.sources.cloud import CloudSource
from data_pipeline.sources.pipe import PipeSource
from data_pipeline.sources.web import HttpSource

__all__ = [
    "Answer",
    "Changed",
    "Source",
    "TransientFault",
    "in_cloud",
    "is_remote",
    "open_source",
    "printable",
]

_CLOUD = ("s3", "s3a", "gs", "az", "azure", "abfs", "abfss")


def is_remote(location: str) -> bool:
    """Whether a data folder is given as a URL or command, not as a path."""
    return location.startswith("pipe:") or re.match(r"[a-z][a-z0-9+.-]*://", location) is not None


def in_cloud(location: str) -> bool:
    """Whether a location is read with obstore."""
    return urlsplit(location).scheme in _CLOUD


def open_source(location: str, timeout_s: float, allow_pipe: bool = False) -> Source:
    """The client for a remote folder. Opens nothing yet.

    Args:
        timeout_s: of a connection, and of each wait for data.

    Raises:
        ValueError: unknown scheme, a command that is not allowed, or obstore is missing.
    """
    scheme = urlsplit(location).scheme
    if scheme in ("http", "https"):
        return HttpSource(location, timeout_s)
    if in_cloud(location):
        return CloudSource(location, timeout_s)
    if scheme == "pipe":
        if not allow_pipe:
            raise ValueError(
                f"{printable(location)}: commands as data folders run programs; "
                "to allow it, set data.remote.allow_pipe=true"
            )
        return PipeSource(location, timeout_s)
    raise ValueError(
        f"{printable(location)}: unknown scheme '{scheme}' of a data folder; give a path, "
        "http(s)://, s3://, gs:// or az://"
    )
