/* Takes mappings away, page tables and all, while another thread of the process sleeps on another processor. */
#define _GNU_SOURCE
#include <pthread.h>
#include <sched.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <unistd.h>

static void run_on(int cpu) {
    cpu_set_t set;
    CPU_ZERO(&set);
    CPU_SET(cpu, &set);
    if (sched_setaffinity(0, sizeof set, &set))
        exit(2);
}

static void *sleep_now_and_then(void *nothing) {
    run_on(1);
    for (;;)
        usleep(2000);
    return nothing;
}

int main(void) {
    pthread_t thread;
    run_on(0);
    if (pthread_create(&thread, NULL, sleep_now_and_then, NULL))
        return 1;
    for (int round = 0; round < 500; round++) {
        /* Nothing else is near: its page tables go with it. */
        char *page = mmap((void *)0x200000000000, 4096, PROT_READ | PROT_WRITE,
                          MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED, -1, 0);
        *page = 1;
        usleep(3000);
        munmap(page, 4096);
    }
    puts("done");
    return 0;
}
