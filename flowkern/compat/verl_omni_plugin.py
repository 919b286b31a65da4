"""For verl-omni's `external_lib`, which is imported and not called: importing this installs."""

from flowkern.compat.verl_omni import install

install()
