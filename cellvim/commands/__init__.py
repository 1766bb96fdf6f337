"""The commands: each is one thin function; `cellvim/cli.py` gives them their names."""
