/* What master does for a container in C: hook.c and relay.c again, for the Cython module. */
#ifndef APY_CONTAINER_CLIENT_H
#define APY_CONTAINER_CLIENT_H

#define APY_WIRE_CLIENT
#include "hook.c"
#include "relay.c"

#endif
