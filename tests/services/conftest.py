"""Tests here may use servers."""

from tests.helpers.servers import bucket, ray_cluster, s3, tracking

__all__ = ["bucket", "ray_cluster", "s3", "tracking"]
