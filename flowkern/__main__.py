"""python -m flowkern."""

from flowkern.cli import main

raise SystemExit(main())
