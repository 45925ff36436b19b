/* The modules of a stage, compiled in by tools/gen_frozen.py. */
#ifndef APY_FROZEN_H
#define APY_FROZEN_H

#include <Python.h>

extern const struct _frozen frozen_modules[];

#endif
