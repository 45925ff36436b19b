/* Which flow this launch can take; the starter judges again, with the real thing in hand. */
#include <fcntl.h>
#include <linux/capability.h>
#include <linux/securebits.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/stat.h>
#include <sys/statvfs.h>
#include <unistd.h>

#include "build.h"
#include "launcher.h"

static bool inside_userns(void) {
    static const char *const initial[] = {"0", "0", "4294967295"};
    char text[128];
    int fd = open("/proc/self/uid_map", O_RDONLY | O_CLOEXEC);
    ssize_t size = fd < 0 ? -1 : read(fd, text, sizeof(text) - 1);
    if (fd >= 0)
        close(fd);
    if (size <= 0)
        return true;
    text[size] = '\0';
    const char *at = text;
    for (size_t i = 0; i < COUNT(initial); i++) {
        at += strspn(at, " ");
        size_t length = strcspn(at, " \n");
        if (length != strlen(initial[i]) || strncmp(at, initial[i], length) != 0)
            return true;
        at += length;
    }
    return strcmp(at, "\n") != 0;
}

static bool lacks_bit(void) {
    struct stat st;
    return stat(APY_STARTER_SUID, &st) != 0 || !S_ISREG(st.st_mode) || st.st_uid != 0 ||
           (st.st_mode & S_ISUID) == 0;
}

static bool mounted_nosuid(void) {
    struct statvfs fs;
    return statvfs(APY_STARTER_SUID, &fs) != 0 || (fs.f_flag & ST_NOSUID) != 0;
}

static bool bounded(void) {
    static const int needed[] = {CAP_SYS_ADMIN, CAP_SETUID, CAP_SETGID};
    for (size_t i = 0; i < COUNT(needed); i++) {
        if (prctl(PR_CAPBSET_READ, needed[i], 0, 0, 0) != 1)
            return true;
    }
    return false;
}

static bool root_is_nobody(void) {
    int securebits = prctl(PR_GET_SECUREBITS, 0, 0, 0, 0);
    return securebits < 0 || ((unsigned)securebits & SECBIT_NOROOT) != 0;
}

/* What root needs too: where uid 0 has no power, it is treated as an ordinary user. */
static enum reason weakness(void) {
    if (inside_userns())
        return REASON_INSIDE_USERNS;
    if (bounded())
        return REASON_BOUNDING;
    return root_is_nobody() ? REASON_NOROOT : REASON_NONE;
}

static enum reason obstacle(void) {
    enum reason weak = weakness();
    if (weak == REASON_INSIDE_USERNS)
        return weak;
    if (lacks_bit())
        return REASON_NO_BIT;
    if (mounted_nosuid())
        return REASON_NOSUID_MOUNT;
    if (prctl(PR_GET_NO_NEW_PRIVS, 0, 0, 0, 0) != 0)
        return REASON_NO_NEW_PRIVS;
    return weak;
}

void flow_choose(struct choice *c, bool userns_asked) {
    bool root = getuid() == 0;
    c->reason = userns_asked ? REASON_ASKED : root ? weakness() : obstacle();
    if (c->reason != REASON_NONE)
        c->flow = FLOW_USERNS;
    else
        c->flow = root ? FLOW_ROOT : FLOW_SETUID;
}
