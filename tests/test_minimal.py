"""Is an installed wheel whole? Needs numpy and safetensors alone; run by Python itself, without a test runner:

python tests/test_minimal.py
"""

import sys

import autocompress_fast as acf


def test_config():
    config = acf.show_config()
    assert config["version"] == acf.__version__
    assert config["isa_active"] in config["isas_supported"]
    assert config["threads"] >= 1


if __name__ == "__main__":
    print(acf.show_config())
    for name, test in list(globals().items()):
        if name.startswith("test_"):
            test()
            print(f"{name} passed")
    assert "torch" not in sys.modules, "torch was imported"
