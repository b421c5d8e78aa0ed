"""`python -m safegene_trl`, for launchers that start modules."""

from .commands.main import main


raise SystemExit(main())
