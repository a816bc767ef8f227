"""What an S3 server means by a refusal, and what to do about it.

Told by the code and never by the message, which servers word as they like and Ceph leaves out. An answer to HEAD has no
code but its status.
"""

import re
from typing import Any, NamedTuple

_RIGHTS = {
    "HeadObject": "s3:GetObject",
    "GetObject": "s3:GetObject",
    "ListObjectsV2": "s3:ListBucket",
    "HeadBucket": "s3:ListBucket",
    "PutObject": "s3:PutObject",
    "CreateMultipartUpload": "s3:PutObject",
    "UploadPart": "s3:PutObject",
    "CompleteMultipartUpload": "s3:PutObject",
    "DeleteObject": "s3:DeleteObject",
    "DeleteObjects": "s3:DeleteObject",
}
_SESSION = "log in again, or unset AWS_SESSION_TOKEN: the session is over"
_ADVICE = {
    "InvalidAccessKeyId": "check AWS_ACCESS_KEY_ID: the server of AWS_ENDPOINT_URL does not know this key",
    "SignatureDoesNotMatch": "check AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY: this is not the secret of the key",
    "RequestTimeTooSkewed": "set this machine's clock (NTP): it differs from the server's by more than 15 minutes",
    "ExpiredToken": _SESSION,
    "InvalidToken": _SESSION,
}
_OTHER_REGION = (
    "AuthorizationHeaderMalformed",
    "PermanentRedirect",
    "TemporaryRedirect",
    "Redirect",
    "301",
    "307",
)
_NAMED = re.compile(rf"(?:(\d{{3}}) )?\b({'|'.join([*_ADVICE, 'AccessDenied', 'NoSuchBucket'])})\b")
_PASSING = (408, 429, 500, 502, 503, 504)


class S3Answer(NamedTuple):
    """A refusal as the server put it."""

    code: str
    """Its name; of an answer to HEAD the status."""
    status: int
    operation: str
    """As `PutObject`; empty where it is not known."""
    region: str
    """Of the bucket, if the server says so."""

    @property
    def nameless(self) -> bool:
        """Whether the server said no more than a status."""
        return self.code.isdigit()


def s3_answer(error: BaseException) -> S3Answer | None:
    """The refusal that an error of s3fs or botocore carries, or that stands in its text; None for other errors."""
    for carrier in (error, error.__cause__):
        if isinstance(response := getattr(carrier, "response", None), dict) and "Error" in response:
            return _parse(response, str(getattr(carrier, "operation_name", "")))
    found = _NAMED.search(str(error))
    return S3Answer(found[2], int(found[1] or 0), "", "") if found else None


def s3_advice(answer: S3Answer, bucket: str, endpoint: str, region: str) -> str | None:
    """What is wrong and what to do, in one line; None where the code says nothing that one could act on.

    Args:
        answer: of the server.
        bucket: that was asked for.
        endpoint: where.
        region: that the request was signed for.
    """
    if answer.code == "NoSuchBucket":
        return f"bucket {bucket!r} does not exist; create it or correct the URL"
    if answer.code in _OTHER_REGION:
        wanted = (
            f"to {answer.region}"
            if answer.region
            else "to the bucket's region, and check AWS_ENDPOINT_URL"
        )
        return f"signed for region {region} ({answer.code}); set AWS_DEFAULT_REGION {wanted}"
    if answer.nameless and not answer.operation.startswith("Head"):
        what = (
            "is its server away, or is it not S3?"
            if answer.status in _PASSING
            else "as no S3 server does"
        )
        said = f"{endpoint} answers {answer.status} without a reason"
        return f"{said}, {what}; check AWS_ENDPOINT_URL (host, port, http or https)"
    if answer.code in _ADVICE:
        return f"access refused ({_shown(answer)}); {_ADVICE[answer.code]}"
    if answer.code == "AccessDenied":
        right = _RIGHTS.get(answer.operation, "the right to it")
        return f"access refused ({_shown(answer)}); ask for {right}: the key is known but may not do this"
    return None


def _parse(response: dict[str, Any], operation: str) -> S3Answer:
    said, meta = response["Error"], response.get("ResponseMetadata", {})
    code = str(said.get("Code", ""))
    if "request time" in str(
        said.get("Message")
    ):  # rclone has the same code for all refusals of a signature
        code = "RequestTimeTooSkewed"
    region = said.get("Region") or meta.get("HTTPHeaders", {}).get("x-amz-bucket-region") or ""
    return S3Answer(code, int(meta.get("HTTPStatusCode", 0)), operation, str(region))


def _shown(answer: S3Answer) -> str:
    return f"{answer.status} {answer.code}" if answer.status else answer.code
