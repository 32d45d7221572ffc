// SPDX-License-Identifier: Apache-2.0 OR GPL-2.0
// A driver of a virtio device that gives random bytes, which has it put them where the kernel has something else: at the address
// that is its parameter. The device, which no page table of the guest's holds back, does the writing.
#include <linux/delay.h>
#include <linux/module.h>
#include <linux/scatterlist.h>
#include <linux/virtio.h>
#include <linux/virtio_config.h>
#include <linux/virtio_ids.h>

static unsigned long target;
module_param(target, ulong, 0);

static struct scatterlist list;

static void used(struct virtqueue *q)
{
}

static struct virtqueue *queue;

static int probe(struct virtio_device *d)
{
	queue = virtio_find_single_vq(d, used, "requests");
	if (IS_ERR(queue))
		return PTR_ERR(queue);
	virtio_device_ready(d);
	return 0;
}

static void gone(struct virtio_device *d)
{
	virtio_reset_device(d);
	d->config->del_vqs(d);
}

static const struct virtio_device_id ids[] = { { VIRTIO_ID_RNG, VIRTIO_DEV_ANY_ID }, {} };

static struct virtio_driver dma = {
	.driver.name = "dma",
	.driver.owner = THIS_MODULE,
	.id_table = ids,
	.probe = probe,
	.remove = gone,
};

/* Not while the kernel holds the device: whoever is killed there keeps it. */
static int __init dma_start(void)
{
	unsigned int length = 0;
	int n, err = register_virtio_driver(&dma);

	if (err || IS_ERR_OR_NULL(queue))
		return err;
	sg_init_one(&list, (void *)target, 8);
	if (!virtqueue_add_inbuf(queue, &list, 1, &list, GFP_KERNEL)) {
		virtqueue_kick(queue);
		for (n = 0; n < 200 && !virtqueue_get_buf(queue, &length); n++)
			msleep(10);
	}
	pr_info("DMA of %u bytes\n", length);
	return 0;
}

static void __exit dma_end(void)
{
	unregister_virtio_driver(&dma);
}

module_init(dma_start);
module_exit(dma_end);
MODULE_LICENSE("GPL");
MODULE_DESCRIPTION("A device writes where the kernel has something else");
