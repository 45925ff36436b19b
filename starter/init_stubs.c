/* Rows whose file has not arrived: each says that it cannot be done. */
#include <errno.h>

#include "init.h"

#define STUB(name)                                                                                 \
    __attribute__((weak)) int name(struct init *s, const struct op_request *q,                     \
                                   struct op_reply *a) {                                           \
        (void)s;                                                                                   \
        (void)q;                                                                                   \
        errno = ENOSYS;                                                                            \
        return init_failed(a);                                                                     \
    }
STUB(init_propagation)
STUB(init_root_bundle)
STUB(init_fs)
STUB(init_fsopt)
STUB(init_tree)
STUB(init_attr)
STUB(init_copyup)
STUB(init_place)
STUB(init_remount)
STUB(init_enter)
STUB(init_root_readonly)
STUB(init_mknod)
STUB(init_link)
STUB(init_readonly_path)
STUB(init_mask_path)
STUB(init_name)
STUB(init_sysctl)
STUB(init_netdev)
STUB(init_run_hooks)
STUB(init_join)
STUB(init_cgroup)
STUB(init_prep)
STUB(init_spaces)
STUB(init_mapped)
STUB(init_keyring)
STUB(init_tenant)
STUB(init_console)
STUB(init_apparmor)
STUB(init_process)
STUB(init_go)

__attribute__((weak)) int init_proc(struct init *s) {
    return s->proc_fd;
}

__attribute__((weak)) int init_link_up(const char *name) {
    (void)name;
    errno = ENOSYS;
    return -1;
}
