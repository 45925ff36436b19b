/* The janitor's place among the control groups. */
#ifndef APY_JANITOR_GROUP_H
#define APY_JANITOR_GROUP_H

/* To the top of each hierarchy that the host shows. */
void leave_control_groups(void);

#endif
