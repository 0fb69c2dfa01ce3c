"""What a device's exports are set up for: recorded in edgeattn.json as defaults, which every command line option overrides."""
TARGETS = {
    "generic":  {"ubatch": 512, "threads": 0},   # 0: as many as there are physical cores
    "pi4":      {"ubatch": 128, "threads": 4},
    "pi5":      {"ubatch": 256, "threads": 4},
    "orin-nano": {"ubatch": 512, "threads": 6},
    "agx-orin": {"ubatch": 512, "threads": 8},   # of 12: the memory is saturated earlier
    "laptop":   {"ubatch": 512, "threads": 4},
}


def target_defaults(target: str, precision: str) -> dict:
    """The run-time defaults of an export. fp32 exports keep an exact cache, so that parity with the checkpoint can be exact."""
    if target not in TARGETS:
        raise ValueError(f"unknown target {target!r}; choose one of {sorted(TARGETS)}")
    return {"kv_type": "f32" if precision == "fp32" else "f16", **TARGETS[target]}
