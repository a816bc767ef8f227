"""Answers of S3 servers that refuse a request: their cause, and advice in one line.

Answers are recognised by their code and never by their message, which differs between servers and
is missing in Ceph's. The answer to a HEAD request has no code, only its status.
"""

import re
from typing import Any, NamedTuple

# the right that an operation needs
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
    "InvalidAccessKeyId": (
        "check AWS_ACCESS_KEY_ID: the server of AWS_ENDPOINT_URL does not know this key"
    ),
    "SignatureDoesNotMatch": (
        "check AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY: this is not the secret of the key"
    ),
    "RequestTimeTooSkewed": (
        "set this machine's clock (NTP): it differs from the server's by more than 15 minutes"
    ),
    "ExpiredToken": _SESSION,
    "InvalidToken": _SESSION,
}
# codes and statuses of a request that was signed for another region than the bucket's
_OTHER_REGION = (
    "AuthorizationHeaderMalformed",
    "PermanentRedirect",
    "TemporaryRedirect",
    "Redirect",
    "301",
    "307",
)
_CODES = "|".join([*_ADVICE, "AccessDenied", "NoSuchBucket"])
_CODE_IN_TEXT = re.compile(rf"(?:(\d{{3}}) )?\b({_CODES})\b")
_TRANSIENT = (408, 429, 500, 502, 503, 504)


class S3Answer(NamedTuple):
    """The answer with which a server refused a request."""

    code: str
    """S3's code; for an answer to HEAD, the status."""
    status: int
    operation: str
    """For example `PutObject`; empty if it is not known."""
    region: str
    """Region of the bucket, if the answer has it."""

    @property
    def nameless(self) -> bool:
        """True if the answer has a status but no code."""
        return self.code.isdigit()


def s3_answer(error: BaseException) -> S3Answer | None:
    """The answer in an error of s3fs or botocore, or in its text; None for other errors."""
    for carrier in (error, error.__cause__):
        response = getattr(carrier, "response", None)
        if isinstance(response, dict) and "Error" in response:
            return _parse(response, str(getattr(carrier, "operation_name", "")))
    in_text = _CODE_IN_TEXT.search(str(error))
    if in_text is None:
        return None
    return S3Answer(code=in_text[2], status=int(in_text[1] or 0), operation="", region="")


def s3_advice(answer: S3Answer, bucket: str, endpoint: str, region: str) -> str | None:
    """The cause of a refusal and advice, in one line; None for codes with no particular advice.

    Args:
        answer: the server's answer.
        bucket: bucket that was asked for.
        endpoint: endpoint that was asked.
        region: for which the request was signed.
    """
    if answer.code == "NoSuchBucket":
        return f"bucket {bucket!r} does not exist; create it or correct the URL"
    if answer.code in _OTHER_REGION:
        wanted = "to the bucket's region, and check AWS_ENDPOINT_URL"
        if answer.region:
            wanted = f"to {answer.region}"
        return f"signed for region {region} ({answer.code}); set AWS_DEFAULT_REGION {wanted}"
    if answer.nameless and not answer.operation.startswith("Head"):
        guess = "as no S3 server does"
        if answer.status in _TRANSIENT:
            guess = "is its server away, or is it not S3?"
        return (
            f"{endpoint} answers {answer.status} without a reason, {guess}; "
            "check AWS_ENDPOINT_URL (host, port, http or https)"
        )
    shown = f"{answer.status} {answer.code}" if answer.status else answer.code
    if answer.code in _ADVICE:
        return f"access refused ({shown}); {_ADVICE[answer.code]}"
    if answer.code == "AccessDenied":
        right = _RIGHTS.get(answer.operation, "the right to it")
        return f"access refused ({shown}); ask for {right}: the key is known but may not do this"
    return None


def _parse(response: dict[str, Any], operation: str) -> S3Answer:
    error, meta = response["Error"], response.get("ResponseMetadata", {})
    code = str(error.get("Code", ""))
    # rclone has one code for all refusals of a signature, also for that of a wrong clock
    if "request time" in str(error.get("Message")):
        code = "RequestTimeTooSkewed"
    region = error.get("Region") or meta.get("HTTPHeaders", {}).get("x-amz-bucket-region") or ""
    return S3Answer(code, int(meta.get("HTTPStatusCode", 0)), operation, str(region))
