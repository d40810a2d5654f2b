"""Storage: URIs (a local path or ``s3://bucket/key``), records by suffix, journals, model folders.

Nothing is imported here, so that a stage which reads a local file never loads boto3, pyarrow or a model library.
"""
