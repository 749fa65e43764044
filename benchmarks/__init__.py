"""How fast fedlora is, measured against its peers: see README.md beside this."""

import fedlora.models  # noqa: F401   before PEFT, whose first import tells of a kernel that nothing here would use
