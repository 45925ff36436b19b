/* What lies over the image: overlays of the kernel's, and which directories they are made of. */
#include <errno.h>
#include <fcntl.h>
#include <linux/capability.h>
#include <linux/mount.h>
#include <linux/openat2.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "layers.h"

enum { STRING_MOST = 255 }; /* of fsconfig(2) */

static void append_fd(char *out, size_t size, int fd) {
    append_text(out, size, "/proc/self/fd/");
    append_number(out, size, (uint64_t)fd);
}

static int set_layer(int fs, const char *key, int fd) {
    char name[48] = "";
    append_fd(name, sizeof(name), fd);
    return set_string(fs, key, name);
}

/* In one string, which every kernel knows; where that is too short, one by one. */
static int set_lowers(int fs, const struct layers *these) {
    char all[LIMIT_IMAGES * 24 + 96] = "";
    for (size_t i = 0; i < these->count; i++) {
        append_text(all, sizeof(all), i > 0 ? ":" : "");
        append_fd(all, sizeof(all), these->lowers[i]);
    }
    if (strlen(all) <= STRING_MOST)
        return set_string(fs, "lowerdir", all);
    for (size_t i = 0; i < these->count; i++)
        if (set_layer(fs, "lowerdir+", these->lowers[i]) < 0)
            return -1;
    return 0;
}

/* Overlay takes its layers by name only, so each is named by a descriptor: of a directory that was
 * pinned, or of a mount itself, which a directory below it would not lead to. */
int layers_mount(const struct launch *l, const struct layers *these, bool of_user, uint64_t caps) {
    bool writable = these->upper >= 0;
    unsigned attributes = nosuid(l) | MOUNT_ATTR_NODEV | (writable ? 0 : MOUNT_ATTR_RDONLY);
    int fs = sys_fsopen("overlay"), mount_fd = -1;
    if (fs < 0)
        return -1;
    if (writable && of_user)
        (void)set_flag(fs, "userxattr"); /* others belong to the host's root */
    if (writable)
        (void)set_string(fs, "index", "off"); /* an upper may meet another image than before */
    /* SAFE: the layers are descriptors that rpc has opened and checked; nosuid and nodev. */
    if (set_string(fs, "source", "overlay") == 0 && set_lowers(fs, these) == 0 &&
        (!writable || (set_layer(fs, "upperdir", these->upper) == 0 &&
                       set_layer(fs, "workdir", these->work) == 0)))
        mount_fd = caps ? make_mount_with(caps, fs, attributes) : make_mount(fs, attributes);
    int error = errno;
    close(fs);
    errno = error;
    return mount_fd;
}

/* From the top down: overlays, the last that was named first; what the mounts need; the image. */
void layers_below(const struct rpc *r, struct layers *out) {
    *out = (struct layers){.upper = -1, .work = -1};
    for (size_t i = r->layer_count; i-- > 0;)
        out->lowers[out->count++] = r->layers[i].fd;
    out->lowers[out->count++] = r->places[PLACE_LOWER];
    out->lowers[out->count++] = r->root_fd;
}

/* The image below what the mounts need.  Made with SYS_ADMIN alone: what the kernel does on behalf
 * of the container in these layers, it does with the user's own rights. */
static int overlay_read_only(const struct rpc *r) {
    struct layers these;
    layers_below(r, &these);
    /* Root of the container's own namespace reads what belongs to its other users. */
    return layers_mount(r->launch, &these, false,
                        fakeroot_wanted(r->launch) ? privs_last_cap_mask() : 0);
}

/* What copying a file up takes: the work directory of the kernel's has mode 0, and root's own
 * overlay keeps the owner of each file. */
static uint64_t writing_caps(const struct launch *l) {
    uint64_t caps = CAP_BIT(CAP_SYS_ADMIN) | CAP_BIT(CAP_DAC_OVERRIDE);
    if (fakeroot_wanted(l))
        return privs_last_cap_mask();
    return l->flow == FLOW_ROOT ? caps | (ROOT_LAYER_CAPS & l->permitted) : caps;
}

/* A memory layer over that.  The kernel's work directory has mode 0, so this one alone is made with
 * DAC_OVERRIDE.  It must lie over the other overlay and not over the image: there, an entry that
 * the user owns in the upper layers would open a directory of the image that is closed to the
 * user. */
static int overlay_writable(struct rpc *r, int upper, int work) {
    int below = layers_merge(r);
    if (below < 0)
        return -1;
    struct layers these = {.lowers = {below}, .count = 1, .upper = upper, .work = work};
    /* The layer below checks every access again with the user's rights. */
    return layers_mount(r->launch, &these,
                        r->launch->flow == FLOW_USERNS || fakeroot_wanted(r->launch),
                        writing_caps(r->launch));
}

/* The read-only overlay, attached; a descriptor of it. */
int layers_merge(struct rpc *r) {
    if (r->merged_fd > 0)
        return r->merged_fd;
    int below = overlay_read_only(r);
    if (below < 0 || attach(below, r->places[PLACE_MERGED]) < 0)
        return -1;
    r->merged_fd = below;
    return below;
}

/* Written by a server that has the user's rights: the kernel's overlay takes no upper directory
 * that is served itself. */
static int overlay_served(struct rpc *r) {
    struct launch *l = r->launch;
    uint32_t device = l->plan.fuse_count - 1;
    int below = layers_merge(r), fuse = fcntl(l->fuse_fds[device], F_DUPFD_CLOEXEC, 3);
    if (below < 0 || fuse < 0)
        return -1;
    int mount_fd = image_fuse(l, device, "fuse-overlayfs", BIND_WRITABLE | BIND_EXTFS,
                              REACH_INSIDE);
    int inside = fakeroot_wanted(l) ? open("/proc/self/ns/user", O_RDONLY | O_CLOEXEC) : -1;
    const int order[] = {below, fuse, r->upper_fd, r->work_fd, inside};
    int result = mount_fd < 0 || (fakeroot_wanted(l) && inside < 0) ? -1 : 0;
    for (size_t i = 0; i < ARRAY_SIZE(order) && result == 0 && order[i] >= 0; i++)
        result = wire_send(l->overlay_socket[0], "L", 1, order[i]);
    int error = errno;
    close(fuse);
    if (inside >= 0)
        close(inside);
    close(l->overlay_socket[0]);
    l->overlay_socket[0] = -1;
    errno = error;
    return result < 0 ? -1 : mount_fd;
}

static int make_layer(struct rpc *r, enum layer_kind kind) {
    switch (kind) {
    case LAYER_OVERLAY:
        return overlay_read_only(r);
    case LAYER_OVERLAY_TMPFS:
        return overlay_writable(r, r->places[PLACE_UPPER], r->places[PLACE_WORK]);
    case LAYER_OVERLAY_USER:
        /* Not with more rights than who owns the directory has. */
        return r->launch->flow == FLOW_SETUID && !fakeroot_wanted(r->launch)
                   ? layers_in_userns(r)
                   : overlay_writable(r, r->upper_fd, r->work_fd);
    case LAYER_OVERLAY_SERVED:
        return overlay_served(r);
    case LAYER_UNDERLAY:
        return clone_tree(r->places[PLACE_UNDERLAY],
                          nosuid(r->launch) | MOUNT_ATTR_NODEV | MOUNT_ATTR_RDONLY, 0, true);
    case LAYER_NONE:
    default:
        return clone_tree(r->root_fd, 0, 0, true);
    }
}

static bool has_what_it_needs(const struct rpc *r, enum layer_kind kind) {
    bool upper = r->upper_fd > 0;
    return (kind == LAYER_OVERLAY_USER || kind == LAYER_OVERLAY_SERVED) == upper;
}

static bool is_planned(const struct launch *l, enum layer_kind kind) {
    if (kind == LAYER_OVERLAY_TMPFS)
        return (l->plan.flags & PLAN_WRITABLE_LAYER) != 0;
    if (kind == LAYER_OVERLAY_SERVED)
        return l->plan.flags & PLAN_SERVED_LAYER && l->overlay_socket[0] >= 0;
    return kind != LAYER_OVERLAY_USER || l->plan.flags & PLAN_USER_LAYER;
}

/* An overlay shows what lies below mounts, which the administrator may have put there to hide it,
 * and which nobody without the right over this namespace could take away. */
static bool would_uncover(const struct rpc *r, enum layer_kind kind) {
    if (r->launch->flow != FLOW_SETUID || kind == LAYER_NONE || kind == LAYER_UNDERLAY)
        return false;
    bool found = r->root_directory && policy_holds_mounts(r->root_fd);
    for (size_t i = 0; i < LIMIT_IMAGES && !found; i++) /* what is a layer, or could become one */
        found = r->images[i].directory && policy_holds_mounts(r->images[i].fd);
    return found;
}

/* LAYER(kind): what lies over the image; from here on targets are looked up in the result. */
int op_layer(struct rpc *r, const struct op_request *q, struct op_reply *a, int *fd_out) {
    const struct launch *l = r->launch;
    if (no_fields_but(q, 0, 1, false, false) < 0 || q->num[0] > LAYER_OVERLAY_SERVED ||
        r->root_fd < 0)
        return ERR_MALFORMED;
    enum layer_kind kind = (enum layer_kind)q->num[0];
    if (!is_planned(l, kind) || !has_what_it_needs(r, kind) || !policy_layer(l, kind))
        return ERR_REFUSED;
    if (would_uncover(r, kind))
        return answer(a, ERR_MOUNT, EINVAL);
    int tree = make_layer(r, kind);
    /* SAFE: trees that earlier operations made, attached to a directory of our own. */
    if (tree < 0 || attach(tree, r->places[PLACE_FINAL]) < 0)
        return answer(a, errno == EUSERS ? ERR_NAMESPACE : ERR_MOUNT, errno);
    return keep_mount(tree, &r->final_fd, fd_out) < 0 ? answer(a, ERR_MOUNT, errno) : ERR_OK;
}

/* Never through a link: whoever fills an overlay owns it, and could lead the kernel elsewhere. */
static int open_below(int dir, const char *name) {
    return open2(dir, name, O_PATH | O_DIRECTORY | O_NOFOLLOW,
                 RESOLVE_BENEATH | RESOLVE_NO_SYMLINKS | RESOLVE_NO_XDEV | RESOLVE_NO_MAGICLINKS);
}

static int add_upper(struct rpc *r, const struct shown_image *image, size_t number) {
    int upper = open_below(image->fd, "upper"), work = open_below(image->fd, "work");
    if (upper < 0 || work < 0)
        return -1;
    r->upper_fd = upper;
    r->work_fd = work;
    r->upper_image = number;
    return 0;
}

/* A layer that was written as an upper one has its content in a directory of that name. */
static int add_lower(struct rpc *r, const struct shown_image *image, size_t number) {
    int content = open_below(image->fd, "upper");
    struct used_layer *layer = &r->layers[r->layer_count];
    layer->image = number;
    layer->inside = content >= 0;
    if (content < 0 && errno != ENOENT)
        return -1;
    layer->fd = content >= 0 ? content : image->fd;
    r->layer_count++;
    /* Overlay takes over what is known of its uppermost directory, and of a FUSE mount's own root
     * that is nothing before somebody has asked. */
    struct stat st;
    return fstat(layer->fd, &st);
}

/* IMAGE_LAYER(number): that image is an overlay, over those before it; writable: the upper one. */
int op_image_layer(struct rpc *r, const struct op_request *q, struct op_reply *a, int *fd_out) {
    (void)fd_out;
    if (no_fields_but(q, BIND_WRITABLE, 1, false, false) < 0 || q->num[0] >= LIMIT_IMAGES ||
        !r->images[q->num[0]].there || r->layer_count >= LIMIT_IMAGES)
        return ERR_MALFORMED;
    const struct shown_image *image = &r->images[q->num[0]];
    bool upper = (q->flags & BIND_WRITABLE) != 0;
    if (upper && (!image->writable || r->upper_fd > 0))
        return ERR_MALFORMED;
    int result = upper ? add_upper(r, image, q->num[0]) : add_lower(r, image, q->num[0]);
    return result < 0 ? answer(a, ERR_UPPER, errno) : ERR_OK;
}
