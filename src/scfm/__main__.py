"""``python -m scfm`` is the same as ``scfm``, for where the script is not on the path."""

from .cli import main

raise SystemExit(main())
