"""Code for every package: exceptions, crash-safe files, checks of untrusted values, the
version.

errors          exceptions, and common checks and messages of settings
files           atomic writes, manifests with hashes, checked reading of JSON and YAML
tensor_files    writing and reading safetensors files one tensor at a time
untrusted       checks of names, types, shapes, sizes and numbers from files; rope: those of rotary embeddings
nested          flattens nested mappings, and compares them
version         the package's version
"""
