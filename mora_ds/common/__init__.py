"""Code for every package: exceptions, crash-safe files, checks of untrusted values, the
version.

errors          exceptions, and common checks and messages of settings
files           atomic writes, manifests with hashes, checked reading of JSON and YAML
tensor_files    writing and reading safetensors files one tensor at a time
nested          flattens nested mappings, and compares them
attributes      attributes that have another value for a while
object_store    objects and leases in a bucket, by fsspec
untrusted       checks of names, types, shapes, sizes and numbers from files; rope: those of rotary embeddings
version         the package's version
"""
