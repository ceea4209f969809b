"""Makes trained convolutional networks smaller and faster."""

from autocompress_fast import _core

__version__ = _core.__version__
