"""The words of --base_device, and the buffers of a base in host memory (`base_ring`)."""

from __future__ import annotations

from enum import Enum

BUFFERS = 2
"""Decoder layers whose weights are on the device: one computes while another one is copied."""


class BaseDevice(str, Enum):
    """Where the frozen weights of the decoder layers are."""

    AUTO = "auto"
    DEVICE = "device"
    HOST = "host"
