"""What every package may use: exceptions, crash-safe files, checks of what files state,
the version.

errors          the exceptions, and the messages that settings have in common
files           atomic writes, manifests with hashes, JSON and YAML that is checked when read
tensor_files    safetensors files, written and read one tensor at a time
untrusted       names, types, shapes, sizes and numbers that come from a file, checked before use
version         the package's version
"""
