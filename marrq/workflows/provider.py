"""The device and the execution provider that files are measured on."""

from exporters.choices import check_device
from marrq.errors import MarrqError

DEVICES = {"cpu": "cpu", "cuda": "gpu", "tensorrt": "gpu"}
"""The device of each provider of runtime/session.py."""

PROVIDERS = {"cpu": "cpu", "gpu": "cuda"}
"""The provider of each device, unless another one is asked for."""


def choose_provider(device: str | None, provider: str | None) -> tuple[str, str]:
    """Device and provider. None: whatever the other one says; both None: the CPU.

    Raises MarrqError for an unknown name, and for a provider that is of another device.
    """
    # Names first: a contradiction is told of names that exist.
    if device is not None:
        check_device(device)
    if provider is None:
        device = device or "cpu"
        return device, PROVIDERS[device]
    if provider not in DEVICES:
        raise MarrqError(f"unknown provider {provider!r}: choose one of {', '.join(DEVICES)}")
    # A file that was made for one device would be timed on the other one.
    if device not in (None, DEVICES[provider]):
        raise MarrqError(
            f"--provider {provider} runs on the {DEVICES[provider]}, and --device {device} was "
            "asked for: leave out one of the two"
        )
    return DEVICES[provider], provider
