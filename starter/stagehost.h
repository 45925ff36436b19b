/* The one door between the starter's dropped children and CPython. */
#ifndef APY_STAGEHOST_H
#define APY_STAGEHOST_H

#include "protocol.h"

int stagehost_run(const struct stage_info *info);
/* For the Cython module: NULL outside a stage. */
const struct stage_info *stagehost_get(void);

#endif
