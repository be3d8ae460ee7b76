/*
 * Preloaded into the guest's kernel, which keeps the vector registers of its processes in a buffer of a size that was
 * fixed when it was built. Where the machine's processor has more of them than fit (AMX), this machine's kernel refuses
 * to set them from such a buffer, and the guest dies at boot. Here what doesn't fit is left as the process has it.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <elf.h>
#include <stdarg.h>
#include <string.h>
#include <sys/ptrace.h>
#include <sys/types.h>
#include <sys/uio.h>

#define WHOLE (64 << 10)

typedef long (*ptrace_call)(enum __ptrace_request, pid_t, void *, void *);

long ptrace(enum __ptrace_request request, ...)
{
    static ptrace_call next;
    static _Thread_local char whole[WHOLE];
    struct iovec all = {whole, sizeof whole}, *asked;
    va_list arguments;
    pid_t process;
    void *address, *data;
    long result;

    va_start(arguments, request);
    process = va_arg(arguments, pid_t);
    address = va_arg(arguments, void *);
    data = va_arg(arguments, void *);
    va_end(arguments);
    if (!next)
        next = (ptrace_call)dlsym(RTLD_NEXT, "ptrace");
    if ((request != PTRACE_GETREGSET && request != PTRACE_SETREGSET) || address != (void *)NT_X86_XSTATE)
        return next(request, process, address, data);

    asked = data;
    result = next(PTRACE_GETREGSET, process, address, &all);
    if (result)
        return result;
    if (asked->iov_len > all.iov_len)
        asked->iov_len = all.iov_len;
    if (request == PTRACE_GETREGSET) {
        memcpy(asked->iov_base, whole, asked->iov_len);
        return 0;
    }
    memcpy(whole, asked->iov_base, asked->iov_len);
    return next(PTRACE_SETREGSET, process, address, &all);
}
