"""Every number in targets/*.toml has a source, and the derived ones agree with what was published."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest

from edgekd import target as targets
from edgekd.types import Device

DEVICES = [(name, device) for name in targets.names() for device in targets.load(name).devices]
PUBLISHED = {  # device → (mode, row of device_specs.csv)
    "orin-nano-8gb-super": ("MAXN_SUPER", "Jetson Orin Nano 8GB Super"),
    "orin-nano-8gb": ("15W", "Jetson Orin Nano 8GB"),
    "orin-nano-4gb": ("10W", "Jetson Orin Nano 4GB"),
    "orin-nx-16gb": ("MAXN", "Jetson Orin NX 16GB"),
    "orin-nx-8gb": ("MAXN", "Jetson Orin NX 8GB"),
    "agx-orin-64gb": ("MAXN", "Jetson AGX Orin 64GB"),
    "agx-xavier-32gb": ("MAXN", "Jetson AGX Xavier"),
    "xavier-nx-8gb": ("20W", "Jetson Xavier NX 8GB"),
    "thor-t5000": ("130W", "Jetson AGX Thor (T5000)"),
}


@pytest.mark.parametrize(("target", "device"), DEVICES, ids=lambda item: getattr(item, "name", item))
def test_every_number_has_a_source(target: str, device: Device) -> None:
    wanted = {"memory_bytes", "peak_ops_per_s", "bandwidth_bytes_per_s"}
    if any(mode.watts for mode in device.modes):
        wanted.add("watts")
    assert set(device.sources) == wanted
    assert all(len(text) > 10 for text in device.sources.values())
    assert device.modes
    assert len({mode.name for mode in device.modes}) == len(device.modes)


def test_names_are_unique_and_peaks_are_ordered() -> None:
    assert len({device.name for _, device in DEVICES}) == len(DEVICES)
    for _, device in DEVICES:
        for mode in device.modes:
            peaks = mode.peak_ops_per_s
            assert 0 < peaks["fp32"] < peaks["fp16"] < peaks["int8"] < 1e15, (device.name, mode.name)
            assert 1e9 < mode.bandwidth_bytes_per_s < 1e12
            assert mode.bandwidth_bytes_per_s <= device.modes[0].bandwidth_bytes_per_s


def test_tensorrt_takes_what_its_target_allows() -> None:
    rules = targets.load("jetson").quantization
    assert (rules.activation, rules.activation_symmetric) == ("int8", True)
    assert not rules.quantize_bias
    assert not rules.quantize_outputs
    assert targets.load("jetson").opset == 19
    assert targets.load("jetson").sources.keys() >= {"onnx", "quantization"}


def test_derived_peaks_agree_with_published_ones(shared_data: Path) -> None:
    with (shared_data / "latency" / "device_specs.csv").open(encoding="utf-8") as file:
        rows = {row["device"]: row for row in csv.DictReader(file)}
    devices = {device.name: device for _, device in DEVICES}
    compared = 0
    for name, (mode_name, row) in PUBLISHED.items():
        mode = next(mode for mode in devices[name].modes if mode.name == mode_name)
        columns = {"fp32": "peak_fp32_gflops", "fp16": "peak_fp16_gflops", "int8": "peak_int8_gops_dense"}
        for precision, column in columns.items():
            if rows[row][column]:
                assert mode.peak_ops_per_s[precision] == pytest.approx(float(rows[row][column]) * 1e9, rel=0.03), name
                compared += 1
        assert mode.bandwidth_bytes_per_s == pytest.approx(float(rows[row]["mem_bandwidth_gbs"]) * 1e9, rel=0.01)
    assert compared > 20
