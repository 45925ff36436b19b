/* Includes protocol.def once for one kind of row: all the others expand to nothing. */
#ifndef FLOW
#define FLOW(...)
#endif
#ifndef REASON
#define REASON(...)
#endif
#ifndef STAGE
#define STAGE(...)
#endif
#ifndef ROLE
#define ROLE(...)
#endif
#ifndef HOOK
#define HOOK(...)
#endif
#ifndef OP
#define OP(...)
#endif
#ifndef LAYERKIND
#define LAYERKIND(...)
#endif
#ifndef KERNELFS
#define KERNELFS(...)
#endif
#ifndef AREA
#define AREA(...)
#endif
#ifndef BINDFLAG
#define BINDFLAG(...)
#endif
#ifndef SPACE
#define SPACE(...)
#endif
#ifndef PLANFLAG
#define PLANFLAG(...)
#endif
#ifndef EVENT
#define EVENT(...)
#endif
#ifndef ERR
#define ERR(...)
#endif
#ifndef GOSTEP
#define GOSTEP(...)
#endif
#ifndef LIMIT
#define LIMIT(...)
#endif
#ifndef STEP
#define STEP(...)
#endif
#ifndef TRACEKIND
#define TRACEKIND(...)
#endif
#ifndef LABELKIND
#define LABELKIND(...)
#endif
#ifndef BEARERPART
#define BEARERPART(...)
#endif
#ifndef CAPABILITY
#define CAPABILITY(...)
#endif
#include "protocol.def"
#undef FLOW
#undef REASON
#undef STAGE
#undef ROLE
#undef HOOK
#undef OP
#undef LAYERKIND
#undef KERNELFS
#undef AREA
#undef BINDFLAG
#undef SPACE
#undef PLANFLAG
#undef EVENT
#undef ERR
#undef GOSTEP
#undef LIMIT
#undef STEP
#undef TRACEKIND
#undef BEARERPART
#undef LABELKIND
#undef CAPABILITY
